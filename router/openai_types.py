"""The shapes of OpenAI's HTTP API that Baton reads and writes, as msgspec structs."""

from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from baton.common.sampling import FinishReason
from baton.router.generation import Report, Usage


class StreamOptions(Struct, frozen=True):
    include_usage: bool | None = None
    # Padding against traffic analysis, which a server may leave out.
    include_obfuscation: bool | None = None


class GenerationBody(Struct, frozen=True, kw_only=True):
    """What both endpoints take; every field may be null, which is absent."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
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
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    request_id: str | None = None
    cache_salt: str | None = None


class ChatBody(GenerationBody, frozen=True, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None


class CompletionBody(GenerationBody, frozen=True, kw_only=True):
    """`prompt`: text, token ids, or a list of one of them."""

    prompt: str | list[Any]


class CachedTokens(Struct, frozen=True):
    cached_tokens: int


class UsageBody(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Delta(Struct):
    """Absent fields are left out, as OpenAI does."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(Struct):
    delta: Delta
    index: int = 0
    logprobs: None = None
    finish_reason: FinishReason | None = None


class ChatChunk(Struct):
    """`usage` is null in all chunks but the last when asked for, and otherwise absent."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    object: str = "chat.completion.chunk"
    usage: UsageBody | UnsetType | None = UNSET
    baton: Report | UnsetType = UNSET


class Message(Struct, frozen=True):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(Struct, frozen=True):
    message: Message
    finish_reason: FinishReason
    index: int = 0
    logprobs: None = None


class ChatCompletion(Struct, frozen=True):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody
    baton: Report
    object: str = "chat.completion"


class TextChoice(Struct):
    text: str
    index: int = 0
    logprobs: None = None
    finish_reason: FinishReason | None = None


class Completion(Struct):
    """The whole answer of /v1/completions, and also each chunk of it."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    object: str = "text_completion"
    usage: UsageBody | UnsetType | None = UNSET
    baton: Report | UnsetType = UNSET


class ModelBody(Struct, frozen=True):
    id: str
    created: int
    max_model_len: int
    object: str = "model"
    owned_by: str = "baton"


class ModelList(Struct, frozen=True):
    data: list[ModelBody]
    object: str = "list"


class ErrorBody(Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str


class ErrorEnvelope(Struct, frozen=True):
    error: ErrorBody


def usage_body(usage: Usage) -> UsageBody:
    return UsageBody(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=CachedTokens(usage.cached_tokens),
    )


# Shared: an encoder keeps no state between calls.
JSON = msgspec.json.Encoder()
