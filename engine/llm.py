"""A model in one process: prompts in, completions out, no servers.

The same engine, cache and sampler as the workers', with the policy of `generation.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypedDict, Unpack

from tokenizers import Tokenizer

from baton.common.errors import ConfigError, InvalidRequest, ModelError
from baton.common.randomness import SystemRandomness
from baton.common.sampling import FinishReason, SamplingParams
from baton.engine import sequence as seq
from baton.engine.engine import Engine
from baton.engine.engine_config import EngineConfig
from baton.engine.generation import Generation, OnToken
from baton.engine.validation import validate_request


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
    device: str
    gpu_memory_share: float
    cuda_graphs: bool
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
        config = EngineConfig(
            model=Path(model),
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            **engine_options,
        )
        self.engine = Engine(config, SystemRandomness())
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
        reasons = Generation(
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


def _load_tokenizer(folder: Path) -> Tokenizer | None:
    path = folder / "tokenizer.json"
    return Tokenizer.from_file(str(path)) if path.exists() else None
