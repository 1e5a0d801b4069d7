"""Chat messages to a prompt, by the model folder's Jinja template.

The environment is the one templates are written for (Hugging Face's "Writing a chat template"
guide), so the text equals, byte for byte, what transformers' `apply_chat_template` renders.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from baton.common.clock import Clock
from baton.common.errors import InvalidRequest, ModelError
from baton.router.tokenizer import CONFIG_FILE, read_json

TEMPLATE_FILE = "chat_template.jinja"
DEFAULT_TEMPLATE = "default"


class ChatTemplate:
    """One compiled template. Rendering is pure but for `strftime_now`."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], clock: Clock) -> None:
        """`special_tokens`: `bos_token` and its like, by name. Raises ModelError on bad syntax."""
        self._source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment(clock).from_string(source)
        except TemplateError as error:
            raise ModelError(f"the model's chat template is broken: {error}") from error

    def render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt. Keys whose value is None are dropped: templates test for missing ones.

        Raises InvalidRequest when the template refuses the messages or fails on them.
        """
        present = [{k: v for k, v in message.items() if v is not None} for message in messages]
        try:
            return self._template.render(
                messages=present,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except TemplateError as error:
            raise InvalidRequest(self._refusal(error), field="messages") from None
        except (
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ):
            # What the template's own expressions raise on messages it was not written for.
            raise InvalidRequest(self._refusal(None), field="messages") from None

    def _refusal(self, error: TemplateError | None) -> str:
        """The template's own words where it wrote them; anything else may quote a message."""
        words = error.message if error is not None else None
        if words and words in self._source:
            return f"the model's chat template refused the messages: {words}"
        return "the model's chat template cannot render these messages; check roles and order"


def load_chat_template(
    folder: Path, special_tokens: Mapping[str, str], clock: Clock
) -> ChatTemplate | None:
    """The folder's template: `chat_template.jinja`, else `tokenizer_config.json`; None without."""
    path = folder / TEMPLATE_FILE
    if path.is_file():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), special_tokens, clock)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: {error}; fetch the model folder again") from error
    found = read_json(folder / CONFIG_FILE).get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if entry}
        found = named.get(DEFAULT_TEMPLATE)
    if found is None:
        return None
    if not isinstance(found, str):
        raise ModelError(
            f"{folder / CONFIG_FILE}: chat_template is neither text nor a list of them"
        )
    return ChatTemplate(found, special_tokens, clock)


class _Generation(Extension):
    """`{% generation %}` marks what an assistant said, for training; here it shows its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a plain set)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_body")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


class _TemplateNamespace(Namespace):
    """`namespace()` without underscore attributes, on which the sandbox relies."""

    # Without a named `self`, which is a fine name for an attribute.
    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError("a chat template may not set underscore attributes of a namespace")


class _DictMaker:
    """The name `dict` in templates: makes dicts, and is not the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment(clock: Clock) -> ImmutableSandboxedEnvironment:
    def strftime_now(pattern: str) -> str:
        return datetime.fromtimestamp(clock.unix_ms() / 1000).strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=strftime_now,
        dict=_DictMaker(),
        namespace=_TemplateNamespace,
    )
    return environment
