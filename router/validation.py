"""The one validator behind HTTP and gRPC: what a client asked for to what the workers are told.

Every rule raises InvalidRequest, or a class below it, with `field` naming the culprit. Messages
hold numbers and names, never text that the client sent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from baton.common.errors import ContextLengthExceeded, InvalidRequest
from baton.common.randomness import Randomness
from baton.common.sampling import SamplingParams
from baton.router.generation_config import GenerationDefaults
from baton.router.tokenizer import check_text

MAX_STOPS: Final = 16
MAX_STOP_BYTES: Final = 256
MAX_STOP_TOKEN_IDS: Final = 128
MAX_LOGIT_BIAS: Final = 300
# Below this, dividing logits by the temperature overflows in half precision (vLLM's bound too).
MIN_TEMPERATURE: Final = 0.01
MIN_REPETITION_PENALTY: Final = 0.01
SEED_BITS: Final = 64

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRequest:
    """The sampling fields as a client may send them; None is absent."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()


def validate_prompt(prompt_tokens: Sequence[int], max_model_len: int, vocab_size: int) -> None:
    """Refuse empty prompts, ids outside the vocabulary and prompts that leave no room."""
    if not prompt_tokens:
        raise InvalidRequest("the prompt is empty; send at least one token", field="prompt")
    if len(prompt_tokens) >= max_model_len:
        raise ContextLengthExceeded(
            f"the prompt has {len(prompt_tokens)} tokens and the model takes {max_model_len} for "
            "prompt and answer together; shorten the prompt",
            field="prompt",
        )
    if min(prompt_tokens) < 0 or max(prompt_tokens) >= vocab_size:
        raise InvalidRequest(
            f"the prompt has a token id outside 0..{vocab_size - 1}", field="prompt"
        )


def validate_stop(stop: Sequence[str]) -> tuple[str, ...]:
    """The stop strings, each non-empty and of bounded length."""
    if len(stop) > MAX_STOPS:
        raise InvalidRequest(
            f"stop has {len(stop)} strings; at most {MAX_STOPS} are taken", field="stop"
        )
    for text in stop:
        check_text(text, "stop")
        num_bytes = len(text.encode())
        if not 0 < num_bytes <= MAX_STOP_BYTES:
            raise InvalidRequest(
                f"a stop string has {num_bytes} bytes; it must have 1 to {MAX_STOP_BYTES}",
                field="stop",
            )
    return tuple(stop)


def validate_sampling(
    request: SamplingRequest,
    *,
    prompt_len: int,
    max_model_len: int,
    vocab_size: int,
    defaults: GenerationDefaults,
    randomness: Randomness,
    kv_tokens: int | None = None,
) -> SamplingParams:
    """Complete and check `request` for a validated prompt; a missing seed is drawn.

    A missing max_tokens takes the model's default, or the room left in the context and in
    `kv_tokens` of KV.
    """
    max_tokens = _max_tokens(request.max_tokens, prompt_len, max_model_len, defaults)
    if request.max_tokens is None and kv_tokens is not None:
        # The last output token is never fed and needs no KV.
        max_tokens = max(1, min(max_tokens, kv_tokens - prompt_len + 1))
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_temperature(_first(request.temperature, defaults.temperature, 1.0)),
        top_p=_top_p(_first(request.top_p, defaults.top_p, 1.0)),
        top_k=_top_k(_first(request.top_k, defaults.top_k, 0), vocab_size),
        min_p=_within("min_p", _first(request.min_p, defaults.min_p, 0.0), 0.0, 1.0),
        repetition_penalty=_within(
            "repetition_penalty",
            _first(request.repetition_penalty, defaults.repetition_penalty, 1.0),
            MIN_REPETITION_PENALTY,
            2.0,
        ),
        presence_penalty=_penalty("presence_penalty", request.presence_penalty),
        frequency_penalty=_penalty("frequency_penalty", request.frequency_penalty),
        seed=_seed(request.seed, randomness),
        min_tokens=_min_tokens(request.min_tokens, max_tokens),
        ignore_eos=bool(request.ignore_eos),
        logit_bias=_logit_bias(request.logit_bias, vocab_size),
        stop_token_ids=_stop_token_ids(request.stop_token_ids, vocab_size),
    )


def _first(*values: T | None) -> T:
    return next(value for value in values if value is not None)


def _within(field: str, value: float, low: float, high: float) -> float:
    # NaN fails both comparisons, infinities one.
    if not low <= value <= high:
        raise InvalidRequest(f"{field} is {value:g}; it must be {low:g} to {high:g}", field=field)
    return value


def _penalty(field: str, value: float | None) -> float:
    return 0.0 if value is None else _within(field, value, -2.0, 2.0)


def _max_tokens(
    asked: int | None, prompt_len: int, max_model_len: int, defaults: GenerationDefaults
) -> int:
    room = max_model_len - prompt_len
    assert room > 0, "validate_prompt refused a prompt that leaves no room"
    if asked is None:
        return room if defaults.max_tokens is None else max(1, min(room, defaults.max_tokens))
    if asked < 1:
        raise InvalidRequest(f"max_tokens is {asked}; it must be at least 1", field="max_tokens")
    if asked > room:
        raise ContextLengthExceeded(
            f"the prompt's {prompt_len} tokens and max_tokens {asked} are "
            f"{prompt_len + asked} together, the model takes {max_model_len}; "
            f"ask for at most {room}",
            field="max_tokens",
        )
    return asked


def _temperature(value: float) -> float:
    _within("temperature", value, 0.0, 2.0)
    return value if value == 0 else max(value, MIN_TEMPERATURE)


def _top_p(value: float) -> float:
    if value == 0:
        raise InvalidRequest("top_p is 0; it must be above 0 and at most 1", field="top_p")
    return _within("top_p", value, 0.0, 1.0)


def _top_k(value: int, vocab_size: int) -> int:
    """0 and vLLM's -1 switch the filter off, and so does keeping the whole vocabulary."""
    if value < -1:
        raise InvalidRequest(f"top_k is {value}; it must be 0 (off) or more", field="top_k")
    return 0 if value == -1 or value >= vocab_size else value


def _seed(value: int | None, randomness: Randomness) -> int:
    if value is None:
        return randomness.bits(SEED_BITS)
    if not -(1 << (SEED_BITS - 1)) <= value < 1 << SEED_BITS:
        raise InvalidRequest("seed does not fit 64 bits", field="seed")
    return value & ((1 << SEED_BITS) - 1)


def _min_tokens(value: int | None, max_tokens: int) -> int:
    if value is None:
        return 0
    if not 0 <= value <= max_tokens:
        raise InvalidRequest(
            f"min_tokens is {value}; it must be 0 to max_tokens, {max_tokens}", field="min_tokens"
        )
    return value


def _logit_bias(
    entries: tuple[tuple[int, float], ...], vocab_size: int
) -> tuple[tuple[int, float], ...]:
    field = "logit_bias"
    if len(entries) > MAX_LOGIT_BIAS:
        raise InvalidRequest(
            f"logit_bias has {len(entries)} entries; at most {MAX_LOGIT_BIAS} are taken",
            field=field,
        )
    ids = [token for token, _ in entries]
    _check_ids(field, ids, vocab_size)
    if len(set(ids)) != len(ids):
        raise InvalidRequest("logit_bias names a token id twice", field=field)
    for _, bias in entries:
        if not math.isfinite(bias) or abs(bias) > 100:
            raise InvalidRequest(f"a logit bias is {bias:g}; it must be -100 to 100", field=field)
    return entries


def _stop_token_ids(ids: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(
            f"stop_token_ids has {len(ids)} ids; at most {MAX_STOP_TOKEN_IDS} are taken",
            field="stop_token_ids",
        )
    _check_ids("stop_token_ids", ids, vocab_size)
    return ids


def _check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    if any(not 0 <= token < vocab_size for token in ids):
        raise InvalidRequest(f"{field} has a token id outside 0..{vocab_size - 1}", field=field)
