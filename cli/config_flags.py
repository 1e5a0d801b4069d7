"""The flags of a verb, made from the fields of a configuration.

A field's description is the help of its flag and its default is shown, but an absent flag stays
None: environment and YAML come after it (`baton.common.config.load`).
"""

import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Annotated, Any, Final, TypeVar, get_args

from cyclopts import Parameter
from pydantic.fields import FieldInfo

from baton.common.config import RouterConfig, WorkerConfig
from baton.common.sizes import parse_bytes

Settings = type[RouterConfig] | type[WorkerConfig]
Verb = TypeVar("Verb", bound=Callable[..., Any])

_BYTE_FIELDS: Final = frozenset({"kv_memory"})


def with_flags(*kinds: Settings, leave_out: Collection[str] = ()) -> Callable[[Verb], Verb]:
    """Give a verb, in place of its `**flags`, one flag per field of these configurations."""

    def decorate(verb: Verb) -> Verb:
        signature = inspect.signature(verb)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = {p.name for p in own} | set(leave_out)
        flags = [flag for kind in kinds for flag in _flags(kind, names)]
        verb.__signature__ = signature.replace(parameters=[*own, *flags])  # type: ignore[attr-defined]
        verb.__annotations__ |= {flag.name: flag.annotation for flag in flags}
        return verb

    return decorate


def convert_bytes(_type: object, tokens: Any) -> int:
    """`parse_bytes` as cyclopts calls a converter."""
    return parse_bytes(tokens[0].value)


def _flags(kind: Settings, taken: set[str]) -> Iterator[inspect.Parameter]:
    for name, info in kind.model_fields.items():
        if name in taken:
            continue
        taken.add(name)
        yield inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[_optional(info), _parameter(name, info)],
        )


def _optional(info: FieldInfo) -> Any:
    annotation: Any = info.annotation
    return annotation if type(None) in get_args(annotation) else annotation | None


def _parameter(name: str, info: FieldInfo) -> Parameter:
    has_default = not info.is_required() and info.default is not None
    shown = f" [default: {info.default}]" if has_default else ""
    text = f"{info.description}{shown}"
    if name in _BYTE_FIELDS:
        return Parameter(help=f"{text}; 512M and 2G are understood", converter=convert_bytes)
    return Parameter(help=text, negative="" if info.default is False else None)
