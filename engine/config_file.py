"""A JSON file of a model folder, read by field: every complaint names the file and the field."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeVar

from baton.common.errors import ModelError

Value = TypeVar("Value", int, float, bool, str)

_KIND_NAMES: Final = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
}


class ConfigFile:
    """The object in a JSON file, or one nested in it (`prefix` is then the path to it).

    A field that is null counts as absent, which is how Hugging Face writes "unset".
    """

    def __init__(self, path: Path, values: Mapping[str, object], prefix: str = "") -> None:
        self.path = path
        self._values = values
        self._prefix = prefix

    @classmethod
    def read(cls, path: Path) -> "ConfigFile":
        """Raises `ModelError` when the file is missing or holds no JSON object."""
        try:
            values = json.loads(path.read_bytes())
        except OSError as error:
            raise ModelError(
                f"{path}: cannot be read ({error.strerror}); a Hugging Face model folder is needed"
            ) from error
        except ValueError as error:
            raise ModelError(
                f"{path}: not valid JSON ({error}); download the file again"
            ) from error
        if not isinstance(values, dict):
            raise ModelError(f"{path}: holds {type(values).__name__}, a JSON object is needed")
        return cls(path, values)

    def has(self, field: str) -> bool:
        return self._values.get(field) is not None

    def is_null(self, field: str) -> bool:
        """Whether the field is there with the value null, for the few where that differs."""
        return field in self._values and self._values[field] is None

    def raw(self, field: str) -> object:
        return self._values.get(field)

    def error(self, field: str, problem: str) -> ModelError:
        """The error to raise about `field`, with its value."""
        name = self._prefix + field
        value = json.dumps(self._values.get(field), default=str)
        return ModelError(f"{self.path}: {name} = {value}: {problem}", field=name)

    def nested(self, field: str) -> "ConfigFile | None":
        """The object under `field`, or None when absent."""
        value = self._values.get(field)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(field, "must be an object")
        return ConfigFile(self.path, value, f"{self._prefix}{field}.")

    def size(self, field: str, default: int | None = None) -> int:
        """A whole number above zero."""
        value = self._typed(field, int, default)
        if value <= 0:
            raise self.error(field, "must be above zero")
        return value

    def whole(self, field: str, default: int | None = None) -> int:
        """A whole number, zero or more."""
        value = self._typed(field, int, default)
        if value < 0:
            raise self.error(field, "must not be negative")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self._values.get(field)
        if type(value) is int:
            value = float(value)
        elif value is None or type(value) is not float:
            value = self._typed(field, float, default)
        if not 0 < value < math.inf:
            raise self.error(field, "must be a finite number above zero")
        return value

    def optional_number(self, field: str) -> float | None:
        return self.number(field) if self.has(field) else None

    def flag(self, field: str, default: bool) -> bool:
        return self._typed(field, bool, default)

    def text(self, field: str, default: str | None = None) -> str:
        return self._typed(field, str, default)

    def _typed(self, field: str, kind: type[Value], default: Value | None) -> Value:
        value = self._values.get(field)
        if value is None:
            if default is None:
                raise self.error(field, f"is missing; it must be {_KIND_NAMES[kind]}")
            return default
        if type(value) is not kind:
            raise self.error(field, f"must be {_KIND_NAMES[kind]}")
        return value
