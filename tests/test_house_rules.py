"""Files and functions of a size that can be read, names that say something, no loose ends."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from support.house import (
    ROOT,
    is_generated,
    package_folders,
    parse,
    python_files,
    tracked_folders,
    where,
)

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "misc", "manager", "common_utils"}
LOOSE_ENDS = re.compile(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b")
ENVIRONMENT_READER = ROOT / "common" / "config.py"
TEXT_SUFFIXES = {".py", ".proto", ".lua", ".toml", ".yaml", ".yml", ".sh"}


def house_files() -> Iterator[Path]:
    """All hand-written modules outside the tests."""
    for top in tracked_folders():
        if top.name != "tests":
            yield from python_files(top)


def own_texts() -> Iterator[Path]:
    for top in tracked_folders():
        for path in sorted(top.rglob("*")):
            if path.suffix in TEXT_SUFFIXES and not is_generated(path) and path.is_file():
                yield path


def test_no_file_is_too_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in house_files()}
    too_long = [where(path, lines) for path, lines in lengths.items() if lines > MAX_FILE_LINES]
    assert too_long == [], f"at most {MAX_FILE_LINES} lines: one file, one idea"


def test_no_function_is_too_long() -> None:
    too_long = []
    for path in house_files():
        for node in ast.walk(parse(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None, "parsed code has line numbers"
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    too_long.append(f"{where(path, node.lineno)}: {node.name} has {lines} lines")
    assert too_long == [], f"at most {MAX_FUNCTION_LINES} lines: a function fits a screen"


def test_names_say_something() -> None:
    vague = [
        str(path.relative_to(ROOT))
        for top in tracked_folders()
        for path in [top, *top.rglob("*")]
        if path.stem in VAGUE_NAMES
    ]
    assert vague == []


def test_there_are_no_loose_ends() -> None:
    found = []
    for path in own_texts():
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if LOOSE_ENDS.search(line):
                found.append(f"{where(path, number)}: {line.strip()}")
    assert found == []


def test_only_the_configuration_reads_the_environment() -> None:
    readers = []
    for folder in {ROOT / folder for folder in package_folders().values()}:
        for path in folder.glob("*.py"):
            if path != ENVIRONMENT_READER and not is_generated(path):
                readers += [where(path, line) for line in _environment_reads(parse(path))]
    assert readers == []


def _environment_reads(tree: ast.Module) -> Iterator[int]:
    names = {"environ", "environb", "getenv", "getenvb"}
    reads = {f"os.{name}" for name in names}
    nodes = (node for node in ast.walk(tree) if isinstance(node, (ast.ImportFrom, ast.Attribute)))
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            found = node.module == "os" and any(alias.name in names for alias in node.names)
        else:
            found = ast.unparse(node) in reads
        if found:
            yield node.lineno


def test_the_rule_sees_both_ways_to_read_the_environment() -> None:
    tree = ast.parse("import os\nos.environ['A']\nos.getenv('A')\nfrom os import environ\n")
    assert sorted(_environment_reads(tree)) == [2, 3, 4]
