"""The house as the tests see it: which folder is which package, and the code in it."""

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Code that is run from the checkout and never imported.
SCRIPT_FOLDERS = ("benchmarks", "docker", "docs", "examples")
GENERATED = ("_pb2.py", "_pb2_grpc.py")


@cache
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def package_folders() -> dict[str, str]:
    """Import name to folder, as pyproject maps them."""
    return dict(pyproject()["tool"]["setuptools"]["package-dir"])


def part_of(package: str) -> str:
    """The part of the house that a module belongs to: `router` for baton.router.fleet."""
    return package.split(".")[1]


def tracked_folders() -> list[Path]:
    """The top-level folders of the house, without build products and hidden ones."""
    skipped = {"build", "dist", "typings", "requirements"}
    return sorted(
        path
        for path in ROOT.iterdir()
        if path.is_dir()
        and not path.name.startswith((".", "_"))
        and not path.name.endswith(".egg-info")
        and path.name not in skipped
    )


def is_generated(path: Path) -> bool:
    return path.name.endswith(GENERATED)


def python_files(folder: Path) -> Iterator[Path]:
    """The hand-written modules below a folder."""
    for path in sorted(folder.rglob("*.py")):
        if not is_generated(path):
            yield path


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"
