"""An OpenAI request's JSON object to a `GenerationRequest`.

Every field is one of: taken, ignored because it cannot change the answer, taken only with the
value that means nothing, or refused. Nothing a client sends names a worker or a transfer, so
`kv_transfer_params` and its like are refused as the unknown fields that they are.
"""

import re
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec

from baton.common.errors import InvalidRequest, UnsupportedField
from baton.router.intake import ChatPrompt, GenerationRequest, Prompt, TextPrompt, TokenPrompt
from baton.router.openai_types import JSON, ChatBody, CompletionBody, GenerationBody
from baton.router.validation import SamplingRequest

IGNORED: Final = frozenset(
    {
        "store", "user", "metadata", "verbosity", "safety_identifier", "service_tier",
        "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    }
)  # fmt: skip
# The values that ask for nothing; null always does.
NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "moderation": (),
    "reasoning_effort": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "return_token_ids": (False,),
    "priority": (0,),
}
MESSAGE_FIELDS: Final = frozenset({"role", "content", "name", "reasoning_content", "refusal"})
MAX_NAMED_CHARACTERS: Final = 64

_PATH: Final = re.compile(r"`\$\.?(.+?)`$")
_TOKEN_ID: Final = re.compile(r"[0-9]{1,10}")

Body = TypeVar("Body", bound=GenerationBody)


@dataclass(frozen=True, slots=True)
class Asked:
    """What to generate, and how the client wants it sent."""

    request: GenerationRequest
    is_stream: bool
    include_usage: bool


def parse_chat(content: dict[str, Any], timeout_s: float) -> Asked:
    """A /v1/chat/completions request. Raises InvalidRequest and UnsupportedField."""
    body = _convert(content, ChatBody)
    messages = [_message(index, message) for index, message in enumerate(body.messages)]
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return _asked(body, ChatPrompt(messages), limit, timeout_s)


def parse_completion(content: dict[str, Any], timeout_s: float) -> Asked:
    """A /v1/completions request. Raises InvalidRequest and UnsupportedField."""
    body = _convert(content, CompletionBody)
    return _asked(body, _prompt(body.prompt), body.max_tokens, timeout_s)


def _convert(content: dict[str, Any], shape: type[Body]) -> Body:
    taken = {}
    for name, value in content.items():
        if name in NEUTRAL:
            _check_neutral(name, value)
        elif name in shape.__struct_fields__:
            taken[name] = value
        elif name not in IGNORED:
            raise InvalidRequest(f"unknown field {_named(name)}; remove it", field=_named(name))
    try:
        return msgspec.convert(taken, shape)
    except msgspec.ValidationError as error:
        words = str(error)
        path = _PATH.search(words)
        raise InvalidRequest(words, field=path[1] if path else None) from None
    except OverflowError:
        raise InvalidRequest("the body has a number that is too large") from None


def _check_neutral(name: str, value: Any) -> None:
    """Refuse a known field that Baton does not serve, if it asks for anything."""
    neutral = NEUTRAL[name]
    if value is None or any(type(value) is type(one) and value == one for one in neutral):
        return
    advice = "leave it out"
    if neutral:
        advice += f" or send {JSON.encode(neutral[0]).decode()}"
    raise UnsupportedField(f"{name} is not supported; {advice}", field=name)


def _named(name: str) -> str:
    """A client's field name, fit to be shown."""
    shown = name if name.isprintable() else ascii(name)
    return shown[:MAX_NAMED_CHARACTERS]


def _asked(body: GenerationBody, prompt: Prompt, limit: int | None, timeout_s: float) -> Asked:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    request = GenerationRequest(
        model=body.model or "",
        prompt=prompt,
        sampling=SamplingRequest(
            max_tokens=limit,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            seed=body.seed,
            min_tokens=body.min_tokens,
            ignore_eos=body.ignore_eos,
            logit_bias=_logit_bias(body.logit_bias or {}),
            stop_token_ids=tuple(body.stop_token_ids or ()),
        ),
        stop=tuple(stop),
        request_id=body.request_id or "",
        timeout_s=timeout_s,
        cache_salt=body.cache_salt,
    )
    options = body.stream_options
    if options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream: true", field="stream_options")
    return Asked(request, bool(body.stream), options is not None and bool(options.include_usage))


def _logit_bias(entries: dict[str, float]) -> tuple[tuple[int, float], ...]:
    if not all(_TOKEN_ID.fullmatch(key) for key in entries):
        raise InvalidRequest("a key of logit_bias is no token id", field="logit_bias")
    return tuple((int(key), bias) for key, bias in entries.items())


def _prompt(prompt: str | list[Any]) -> Prompt:
    if isinstance(prompt, str):
        return TextPrompt(prompt)
    if prompt and all(type(token) is int for token in prompt):
        return TokenPrompt(prompt)
    if len(prompt) == 1 and isinstance(prompt[0], str | list):
        return _prompt(prompt[0]) if prompt[0] else TextPrompt("")
    if not prompt:
        return TextPrompt("")
    if all(isinstance(one, str | list) for one in prompt):
        raise UnsupportedField(
            f"prompt is a list of {len(prompt)} prompts; send one a request", field="prompt"
        )
    raise InvalidRequest("prompt must be text, token ids, or a list of one of them", field="prompt")


def _message(index: int, message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates see it: strings, without what is null."""
    where = f"messages[{index}]"
    present = {name: value for name, value in message.items() if value is not None}
    for name, value in present.items():
        if name not in MESSAGE_FIELDS and value != []:
            raise UnsupportedField(
                f"{where}.{_named(name)} is not supported; remove it",
                field=f"{where}.{_named(name)}",
            )
        if name in MESSAGE_FIELDS and name != "content" and not isinstance(value, str):
            raise InvalidRequest(f"{where}.{name} must be text", field=f"{where}.{name}")
    content = present.get("content")
    if content is None:
        raise InvalidRequest(f"{where}.content is missing", field=f"{where}.content")
    fields = {name: value for name, value in present.items() if name in MESSAGE_FIELDS}
    return {**fields, "content": _content(where, content)}


def _content(where: str, content: Any) -> str:
    """Text parts are joined by line breaks, as vLLM does for templates that take text."""
    if isinstance(content, str):
        return content
    field = f"{where}.content"
    if not isinstance(content, list):
        raise InvalidRequest(f"{field} must be text or a list of parts", field=field)
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in ("text", "refusal"):
            raise UnsupportedField(f"{field} has a part that is not text", field=field)
        text = part.get(part["type"])
        if not isinstance(text, str):
            raise InvalidRequest(f"{field} has a text part without text", field=field)
        texts.append(text)
    return "\n".join(texts)
