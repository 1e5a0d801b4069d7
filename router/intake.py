"""From what a front parsed to a validated spec: the model, the prompt's tokens, the sampling."""

import asyncio
import re
from dataclasses import dataclass
from typing import Any, Final

from baton.common.errors import DeadlineExceeded, InvalidRequest
from baton.common.randomness import Randomness
from baton.router.catalog import Catalog
from baton.router.generation import GenerationSpec
from baton.router.served_model import ServedModel
from baton.router.tenancy import tenant_key
from baton.router.tokenizer import check_text
from baton.router.validation import (
    SamplingRequest,
    validate_prompt,
    validate_sampling,
    validate_stop,
)

REQUEST_ID_PATTERN: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")
# Closed, because some templates build control tokens out of the role.
ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool"})
# Shorter texts are tokenized faster than a thread is woken.
INLINE_CHARACTERS: Final = 8192


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Raw text: special tokens in it are tokens, and the model's BOS comes in front."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Messages as the template sees them: `role`, `content` and optional string fields."""

    messages: list[dict[str, Any]]


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A request as a client sent it. An empty `request_id` has one drawn."""

    model: str
    prompt: Prompt
    sampling: SamplingRequest
    stop: tuple[str, ...]
    request_id: str
    timeout_s: float
    cache_salt: str | None = None


@dataclass(frozen=True, slots=True)
class Admitted:
    model: ServedModel
    spec: GenerationSpec


class Intake:
    """The validator that HTTP and gRPC share."""

    def __init__(
        self, catalog: Catalog, randomness: Randomness, *, tenant_secret: bytes = b""
    ) -> None:
        self._catalog = catalog
        self._randomness = randomness
        self._tenant_secret = tenant_secret

    async def admit(self, request: GenerationRequest, request_id: str) -> Admitted:
        """The spec of a request called `request_id`, which `name_request` gave.

        Raises InvalidRequest, ModelNotFound or DeadlineExceeded.
        """
        if request.timeout_s <= 0:
            raise DeadlineExceeded("the request's deadline had passed when it arrived")
        model = self._catalog.get(request.model)
        stop = validate_stop(request.stop)
        key = tenant_key(self._tenant_secret, request.cache_salt)
        tokens = await tokenize(model, request.prompt)
        validate_prompt(tokens, model.max_model_len, model.vocab_size)
        sampling = validate_sampling(
            request.sampling,
            prompt_len=len(tokens),
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            defaults=model.defaults,
            randomness=self._randomness,
            kv_tokens=model.kv_tokens,
        )
        spec = GenerationSpec(
            request_id=request_id,
            model=model.name,
            prompt_tokens=tokens,
            sampling=sampling,
            stop=stop,
            tenant_key=key,
            timeout_s=request.timeout_s,
            end_token_ids=frozenset() if sampling.ignore_eos else model.defaults.eos_token_ids,
        )
        return Admitted(model, spec)

    def name_request(self, wished: str) -> str:
        """The client's name for the request, or a drawn one. Raises InvalidRequest."""
        if not wished:
            return f"{self._randomness.bits(128):032x}"
        if not REQUEST_ID_PATTERN.fullmatch(wished):
            raise InvalidRequest(
                "a request id has 1 to 128 characters of A-Z a-z 0-9 . _ -", field="request_id"
            )
        return wished


async def tokenize(model: ServedModel, prompt: Prompt) -> list[int]:
    """The prompt's token ids; long texts are encoded in a thread, so that streams go on."""
    if isinstance(prompt, TokenPrompt):
        return prompt.token_ids
    if isinstance(prompt, TextPrompt):
        text, mark = prompt.text, None
        if not text:
            raise InvalidRequest("the prompt is empty; send at least one token", field="prompt")
    else:
        text, mark = _render(model, prompt.messages)
    if len(text) <= INLINE_CHARACTERS:
        return _encode(model, prompt, text, mark)
    return await asyncio.to_thread(_encode, model, prompt, text, mark)


def _encode(model: ServedModel, prompt: Prompt, text: str, mark: str | None) -> list[int]:
    if isinstance(prompt, ChatPrompt):
        return model.tokenizer.encode_chat(text, mark)
    return model.tokenizer.encode(text, add_special_tokens=True)


def _render(model: ServedModel, messages: list[dict[str, Any]]) -> tuple[str, str | None]:
    """The rendered chat, and the mark on control-token strings in the messages if there are any."""
    if not messages:
        raise InvalidRequest("messages is empty; send at least one", field="messages")
    if model.template is None:
        raise InvalidRequest(
            f"model {model.name} has no chat template; use completions with a raw prompt",
            field="messages",
        )
    for index, message in enumerate(messages):
        if message.get("role") not in ROLES:
            raise InvalidRequest(
                f"messages[{index}].role is none of {', '.join(sorted(ROLES))}",
                field=f"messages[{index}].role",
            )
        for name, value in message.items():
            if isinstance(value, str):
                check_text(value, f"messages[{index}].{name}")
    marked, mark = model.tokenizer.control_text.mark(messages)
    return model.template.render(marked), mark
