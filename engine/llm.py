"""A model in one process: prompts in, completions out, no servers.

The same engine, cache and sampler as the workers', with the simplest policy that is safe: first
come first served, all blocks of a request reserved before it starts (so a started one always
ends), every decode in every step, and prompts in chunks with what is left of the token budget.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypedDict, Unpack

from tokenizers import Tokenizer

from baton.common.errors import ConfigError, InvalidRequest, ModelError
from baton.common.randomness import SystemRandomness
from baton.common.sampling import FinishReason, SamplingParams
from baton.engine import sequence as seq
from baton.engine.engine import Engine, EngineConfig
from baton.engine.finish import finish_reason
from baton.engine.validation import kv_tokens, validate_request

# Called with the index of the prompt and its newest token id, in the thread that generates.
OnToken = Callable[[int, int], None]


class EngineOptions(TypedDict, total=False):
    """The fields of `EngineConfig` beside the model, all optional."""

    dtype: str
    block_size: int
    num_blocks: int | None
    kv_memory_bytes: int | None
    max_model_len: int | None
    load_format: Literal["auto", "dummy"]
    num_threads: int | None
    kv_digest: bool
    arena_device: str
    check_invariants: bool


# As vLLM: short, so that a first try answers soon.
DEFAULT_SAMPLING: Final = SamplingParams(max_tokens=16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The answer to one prompt.

    `token_ids` has the token that ended it; `text` has no special tokens, and is empty if the
    model folder has no tokenizer. `cached_tokens` of the `prompt_tokens` came from the cache.
    """

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int


class LLM:
    """A model that generates. Not thread-safe; its prefix cache lives from call to call.

    `max_num_batched_tokens` bounds a step, `max_num_seqs` the sequences in it. Raises ConfigError
    and ModelError as `EngineConfig` and `Engine` do.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        max_num_batched_tokens: int = 2048,
        max_num_seqs: int = 256,
        **engine_options: Unpack[EngineOptions],
    ) -> None:
        if not 1 <= max_num_seqs <= max_num_batched_tokens:
            raise ConfigError(
                f"max_num_seqs {max_num_seqs} must lie in [1, max_num_batched_tokens "
                f"{max_num_batched_tokens}]: each running sequence takes a token of every step"
            )
        self.engine = Engine(EngineConfig(model=Path(model), **engine_options), SystemRandomness())
        self._folder = Path(model)
        self._tokenizer = _load_tokenizer(self._folder)
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs

    def generate(
        self,
        prompts: Sequence[str] | Sequence[list[int]],
        sampling: SamplingParams | Sequence[SamplingParams] = DEFAULT_SAMPLING,
        *,
        tenant_key: bytes = b"",
        on_token: OnToken | None = None,
    ) -> list[Completion]:
        """The completion of each prompt (text, or token ids), in the order of the prompts.

        `sampling` is one for all or one per prompt. Prefixes are shared within a `tenant_key` (at
        most 64 bytes) alone. Raises InvalidRequest or ExceedsKvCapacity before anything runs.
        """
        encoded = [self._encode(prompt) for prompt in prompts]
        each = [sampling] * len(encoded) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(each) != len(encoded):
            raise InvalidRequest(
                f"{len(each)} sampling parameters for {len(encoded)} prompts; give one, or one per "
                "prompt",
                field="sampling",
            )
        for prompt, params in zip(encoded, each, strict=True):
            validate_request(prompt, params, self.engine)
        sequences = [
            self.engine.new_sequence(prompt, params, tenant_key)
            for prompt, params in zip(encoded, each, strict=True)
        ]
        reasons = _Generation(
            self.engine, sequences, self._max_num_batched_tokens, self._max_num_seqs, on_token
        ).run()
        return [
            self._completion(sequence, reason)
            for sequence, reason in zip(sequences, reasons, strict=True)
        ]

    def _encode(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        if self._tokenizer is None:
            raise ModelError(f"{self._folder} has no tokenizer.json; give token ids, not text")
        return list(self._tokenizer.encode(prompt).ids)

    def _completion(self, sequence: seq.Sequence, reason: FinishReason) -> Completion:
        token_ids = sequence.tokens[sequence.prompt_len :]
        return Completion(
            token_ids=token_ids,
            text="" if self._tokenizer is None else self._tokenizer.decode(token_ids),
            finish_reason=reason,
            prompt_tokens=sequence.prompt_len,
            cached_tokens=sequence.num_cached,
        )


class _Generation:
    """One call of `generate`: the queue, the running sequences, and why each one ended."""

    def __init__(
        self,
        engine: Engine,
        sequences: list[seq.Sequence],
        max_num_batched_tokens: int,
        max_num_seqs: int,
        on_token: OnToken | None,
    ) -> None:
        self._engine = engine
        self._waiting = deque(sequences)
        self._running: list[seq.Sequence] = []
        self._index = {sequence: index for index, sequence in enumerate(sequences)}
        self._reasons: dict[seq.Sequence, FinishReason] = {}
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._on_token = on_token

    def run(self) -> list[FinishReason]:
        """Step until all have ended; no blocks stay reserved, whatever is raised on the way."""
        try:
            while self._waiting or self._running:
                self._admit()
                self._step()
        finally:
            for sequence in self._running:
                self._engine.kv.release(sequence)
        return [self._reasons[sequence] for sequence in self._index]

    def _admit(self) -> None:
        max_model_len = self._engine.model_config.max_model_len
        while self._waiting and len(self._running) < self._max_num_seqs:
            sequence = self._waiting[0]
            num_tokens = kv_tokens(sequence.prompt_len, sequence.sampling, max_model_len)
            if not self._engine.kv.reserve(sequence, num_tokens, sequence.prompt_len - 1):
                break
            self._running.append(self._waiting.popleft())
        assert self._running, "a validated request fits an arena that nobody else uses"

    def _plan(self) -> list[seq.Chunk]:
        """Every decode, then prompts in order of arrival until the budget is used up."""
        chunks = [seq.Chunk(sequence, 1) for sequence in self._running if sequence.num_pending == 1]
        budget = self._max_num_batched_tokens - len(chunks)
        for sequence in self._running:
            if sequence.num_pending > 1 and budget > 0:
                chunk = seq.Chunk(sequence, min(sequence.num_pending, budget))
                budget -= chunk.num_tokens
                chunks.append(chunk)
        return chunks

    def _step(self) -> None:
        engine = self._engine
        chunks = self._plan()
        sampled = engine.step(chunks)
        for chunk in chunks:
            engine.kv.publish(chunk.sequence, chunk.sequence.num_computed)
        for sequence, token in sampled:
            if self._on_token is not None:
                self._on_token(self._index[sequence], token)
            model = engine.model_config
            reason = finish_reason(sequence, model.eos_token_ids, model.max_model_len)
            if reason is not None:
                self._reasons[sequence] = reason
        for sequence in self._running:
            if sequence in self._reasons:
                engine.kv.release(sequence)
        self._running = [each for each in self._running if each not in self._reasons]
        engine.check(sequences=self._running)


def _load_tokenizer(folder: Path) -> Tokenizer | None:
    path = folder / "tokenizer.json"
    return Tokenizer.from_file(str(path)) if path.exists() else None
