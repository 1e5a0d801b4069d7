"""What an engine can serve at all: checks of a request against its model and its arena."""

from collections.abc import Sequence

from baton.common.errors import ContextLengthExceeded, ExceedsKvCapacity, InvalidRequest
from baton.common.sampling import SamplingParams
from baton.engine.engine import Engine


def kv_tokens(prompt_len: int, sampling: SamplingParams, max_model_len: int) -> int:
    """Tokens to reserve blocks for, so that the sequence can run to its end."""
    return min(prompt_len + sampling.max_tokens, max_model_len)


def validate_request(prompt: Sequence[int], sampling: SamplingParams, engine: Engine) -> None:
    """Raise InvalidRequest, ContextLengthExceeded or ExceedsKvCapacity if it cannot be served."""
    model = engine.model_config
    _validate_prompt(prompt, model.vocab_size, model.max_model_len)
    _validate_sampling(sampling, model.vocab_size)
    num_blocks = engine.kv.num_blocks(kv_tokens(len(prompt), sampling, model.max_model_len))
    if num_blocks > engine.num_blocks:
        raise ExceedsKvCapacity(
            f"{len(prompt)} prompt tokens and max_tokens {sampling.max_tokens} need {num_blocks} "
            f"KV blocks, the arena has {engine.num_blocks}; ask for fewer tokens",
            field="max_tokens",
        )


def _validate_prompt(prompt: Sequence[int], vocab_size: int, max_model_len: int) -> None:
    if not prompt:
        raise InvalidRequest("the prompt has no tokens; give at least one", field="prompt")
    if len(prompt) >= max_model_len:
        raise ContextLengthExceeded(
            f"the prompt has {len(prompt)} tokens and the model takes {max_model_len} with the "
            "output; shorten the prompt",
            field="prompt",
        )
    for position, token in enumerate(prompt):
        if not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"token id {token} at position {position} is not in [0, {vocab_size})",
                field="prompt",
            )


def _validate_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    inf = float("inf")
    # Name, value, lowest and highest that are allowed. NaN is in no range.
    ranges = (
        ("max_tokens", sampling.max_tokens, 1, inf),
        ("min_tokens", sampling.min_tokens, 0, sampling.max_tokens),
        ("temperature", sampling.temperature, 0.0, 1e6),
        ("top_p", sampling.top_p, 1e-9, 1.0),
        ("top_k", sampling.top_k, 0, inf),
        ("min_p", sampling.min_p, 0.0, 1.0),
        ("repetition_penalty", sampling.repetition_penalty, 1e-6, 1e6),
        ("presence_penalty", sampling.presence_penalty, -1e6, 1e6),
        ("frequency_penalty", sampling.frequency_penalty, -1e6, 1e6),
        ("seed", sampling.seed, 0, 2**64 - 1),
    )
    for name, value, lowest, highest in ranges:
        if not lowest <= value <= highest:
            raise InvalidRequest(
                f"{name} is {value}; it must lie in [{lowest:g}, {highest:g}]", field=name
            )
    for token, bias in sampling.logit_bias:
        if not 0 <= token < vocab_size or not -1e6 <= bias <= 1e6:
            raise InvalidRequest(
                f"logit_bias {bias} for token id {token}: ids lie in [0, {vocab_size}), and a bias "
                "is finite",
                field="logit_bias",
            )
