"""What a worker refuses at once. Routers validate too, but a worker does not rely on it."""

import math
from dataclasses import dataclass
from typing import Final

from baton.common.errors import (
    AlreadyExists,
    BatonError,
    ContextLengthExceeded,
    DeadlineExceeded,
    ExceedsKvCapacity,
    InvalidRequest,
    NoWorker,
    QueueFull,
)
from baton.common.messages import Submit
from baton.common.sampling import SamplingParams

# Beyond these, logits are no numbers any more or no token stays possible. Values travel as 32-bit
# floats, so lower bounds leave room for the router's own to be rounded down.
_BOUNDS: Final = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.009, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
_MAX_LOGIT_BIAS: Final = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The bounds of this worker."""

    max_model_len: int
    vocab_size: int
    num_blocks: int
    block_size: int
    max_requests: int

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


def refusal(
    submit: Submit,
    limits: Limits,
    *,
    kv_tokens: int,
    num_requests: int,
    has_ended: bool,
    is_draining: bool,
) -> BatonError | None:
    """Why this submit cannot be taken, or None. `kv_tokens`: what its blocks must hold here."""
    prompt, output = submit.prompt_tokens, submit.output_tokens
    if not prompt:
        return InvalidRequest("the prompt is empty", field="prompt")
    if max(prompt) >= limits.vocab_size:
        return InvalidRequest(
            f"token id {max(prompt)} is outside the vocabulary of {limits.vocab_size}",
            field="prompt",
        )
    if output and max(output) >= limits.vocab_size:
        return InvalidRequest("an output token is outside the vocabulary", field="output")
    if len(output) >= submit.sampling.max_tokens:
        return InvalidRequest(
            f"{len(output)} tokens of at most {submit.sampling.max_tokens} are there already",
            field="output",
        )
    error = _sampling_refusal(submit.sampling, limits.vocab_size)
    if error is not None:
        return error
    if len(prompt) + submit.sampling.max_tokens > limits.max_model_len:
        return ContextLengthExceeded(
            f"{len(prompt)} prompt tokens and {submit.sampling.max_tokens} output tokens exceed "
            f"the model length of {limits.max_model_len}; shorten either",
            field="max_tokens",
        )
    if limits.num_blocks_for(kv_tokens) > limits.num_blocks:
        return ExceedsKvCapacity(
            f"the request needs {limits.num_blocks_for(kv_tokens)} KV blocks, the worker has "
            f"{limits.num_blocks}; shorten it or give the worker more --kv-memory"
        )
    if not (math.isfinite(submit.time_left_s) and math.isfinite(submit.age_s)):
        return InvalidRequest("age and time left are finite seconds", field="time_left_s")
    if submit.time_left_s <= 0:
        return DeadlineExceeded("the deadline passed before the request reached the worker")
    if has_ended:
        return AlreadyExists(f"attempt {submit.key.attempt} of this transfer has ended here")
    if is_draining:
        return NoWorker("the worker drains and takes no further requests", retry_after_s=1.0)
    if num_requests >= limits.max_requests:
        return QueueFull(
            f"the worker holds {limits.max_requests} requests already", retry_after_s=1.0
        )
    return None


def _sampling_refusal(sampling: SamplingParams, vocab_size: int) -> BatonError | None:
    for field, (low, high) in _BOUNDS.items():
        value = getattr(sampling, field)
        # NaN fails the comparison.
        if not low <= value <= high:
            return InvalidRequest(
                f"{field} is {value:g}; it must be {low:g} to {high:g}", field=field
            )
    for token, bias in sampling.logit_bias:
        if token >= vocab_size:
            return InvalidRequest(
                f"logit_bias names a token outside the vocabulary of {vocab_size}",
                field="logit_bias",
            )
        if not abs(bias) <= _MAX_LOGIT_BIAS:
            return InvalidRequest(
                f"a logit bias is {bias:g}; it must be -100 to 100", field="logit_bias"
            )
    if sampling.max_tokens < 1:
        return InvalidRequest("max_tokens must be at least 1", field="max_tokens")
    return None
