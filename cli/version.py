"""`baton version`."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from baton.cli.flags import JsonFlag
from baton.cli.terminal import show_json, show_line

# Read from package metadata: none of them is imported.
_PARTS: Final = ("grpcio", "torch", "nixl-cu12", "nixl-cu13", "redis", "tokenizers")


def show_version(*, as_json: JsonFlag = False) -> None:
    """The versions of Baton, Python and the packages that decide what this install can do."""
    found = {"baton": version("kvbaton"), "python": platform.python_version()}
    found |= {name: installed for name in _PARTS if (installed := _installed(name)) is not None}
    if as_json:
        show_json(found)
        return
    for name, installed in found.items():
        show_line(f"{name} {installed}")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
