"""A part imports only parts on lower floors; what must do without torch does."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.house import ROOT, package_folders, parse, part_of, python_files, where

FLOORS = {
    "cli": 6,
    "router": 5,
    "prefill_worker": 5,
    "decode_worker": 5,
    "worker": 4,
    "kvtransfer": 3,
    "metadata": 3,
    "client": 3,
    "engine": 2,
    "kernels": 1,
    "common": 0,
    "v1": -1,
}
# Beside the house: made models, for the command line alone.
MODELS = "models"
NO_TORCH = ("router", "common", "metadata", "client", "cli")
# The command line loads some verbs late, and those may need torch.
LOADS_WITHOUT_TORCH = ("router", "common", "metadata", "client")
POLICIES = ("baton.prefill_worker.scheduler", "baton.decode_worker.scheduler")


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every module that is imported anywhere below, also inside functions, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports are banned"
            module = node.module or ""
            if module == "baton":
                for alias in node.names:
                    yield f"baton.{alias.name}", node.lineno
            else:
                yield module, node.lineno
        elif isinstance(node, ast.Call) and _is_import_module(node.func):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value, node.lineno


def _is_import_module(func: ast.expr) -> bool:
    name = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
    return name in ("import_module", "__import__")


def modules() -> Iterator[tuple[str, str, Path]]:
    """Every module of the house: its part, its import name, its file."""
    for package, folder in package_folders().items():
        for path in sorted((ROOT / folder).glob("*.py")):
            name = package if path.stem == "__init__" else f"{package}.{path.stem}"
            yield part_of(package), name, path


def may_import(importer: str, imported_part: str) -> bool:
    if importer == imported_part:
        return True
    if imported_part == MODELS:
        return importer == "cli"
    floor = FLOORS["cli"] - 1 if importer == MODELS else FLOORS[importer]
    return FLOORS[imported_part] < floor


def test_every_part_has_a_floor() -> None:
    assert {part_of(package) for package in package_folders()} == {*FLOORS, MODELS}


def test_a_part_imports_lower_floors_alone() -> None:
    wrong = []
    for part, _, path in modules():
        for name, line in imported(parse(path)):
            if not name.startswith("baton."):
                continue
            if not may_import(part, part_of(name)):
                wrong.append(f"{where(path, line)}: {part} imports {name}")
    assert wrong == []


def test_the_rule_sees_imports_inside_functions() -> None:
    tree = ast.parse(
        "def late():\n    from baton import router\n    import baton.cli.main\n"
        "    import_module('baton.engine')\n"
    )
    assert [name for name, _ in imported(tree)] == [
        "baton.router",
        "baton.cli.main",
        "baton.engine",
    ]
    assert not may_import("worker", "router")
    assert not may_import("kvtransfer", "metadata")
    assert not may_import("prefill_worker", "decode_worker")
    assert not may_import("engine", MODELS)


def test_parts_without_torch_do_not_import_it_at_the_top() -> None:
    wrong = []
    for part, _, path in modules():
        if part not in NO_TORCH:
            continue
        for node in parse(path).body:
            for name, line in imported(node):
                at_once = not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
                if name.split(".")[0] == "torch" and at_once:
                    wrong.append(where(path, line))
    assert wrong == []


def without_torch(names: list[str]) -> None:
    """Import the modules in a process where torch cannot be imported."""
    program = (
        "import importlib, sys\n"
        "sys.modules['torch'] = None\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *names], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("part", LOADS_WITHOUT_TORCH)
def test_a_part_loads_where_torch_is_not_installed(part: str) -> None:
    without_torch([name for of, name, _ in modules() if of == part])


def test_the_command_line_starts_where_torch_is_not_installed() -> None:
    without_torch(["baton.cli.main"])


@pytest.mark.parametrize("policy", POLICIES)
def test_scheduling_policies_load_without_torch(policy: str) -> None:
    without_torch([policy])


def test_the_client_needs_grpc_and_protobuf_alone() -> None:
    allowed = {"grpc", "grpc_status", "google", "baton", *sys.stdlib_module_names}
    wrong = [
        f"{where(path, line)}: {name}"
        for path in python_files(ROOT / "client")
        for name, line in imported(parse(path))
        if name.split(".")[0] not in allowed
    ]
    assert wrong == []
