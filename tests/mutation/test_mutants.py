"""The list of planted faults does not rot: each can be planted, and who catches it is there.

Whether they are caught is what `make mutation` tells; it takes some minutes.
"""

import ast
from collections import Counter
from pathlib import Path

import pytest
from mutation.mutant import Edit, Mutant
from mutation.mutants import HAPPY_PATH, MUTANTS, VISIBLE
from mutation.run import Run, Verdict
from support.house import ROOT

ALL = (VISIBLE, *MUTANTS)


def functions_of(path: Path) -> set[str]:
    """The functions of a test file that pytest collects."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, functions)}


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_each_fault_can_be_planted(mutant: Mutant) -> None:
    assert mutant.misfits(ROOT) == []
    assert mutant.edits
    assert all(edit.old != edit.new for edit in mutant.edits)


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_a_planted_file_is_python_still(mutant: Mutant, tmp_path: Path) -> None:
    for name in {edit.file for edit in mutant.edits}:
        copy = tmp_path / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    for edit in mutant.edits:
        edit.apply(tmp_path)
    for name in {edit.file for edit in mutant.edits}:
        planted = ast.parse((tmp_path / name).read_text(encoding="utf-8"))
        assert ast.dump(planted) != ast.dump(ast.parse((ROOT / name).read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "node_id", sorted({*HAPPY_PATH, *(node for mutant in MUTANTS for node in mutant.caught_by)})
)
def test_who_catches_it_exists(node_id: str) -> None:
    name, _, function = node_id.partition("::")
    assert (ROOT / name).is_file()
    assert not function or function in functions_of(ROOT / name)


def test_names_are_given_once_and_nobody_is_caught_by_the_happy_path() -> None:
    assert Counter(mutant.name for mutant in ALL).most_common(1)[0][1] == 1
    for mutant in MUTANTS:
        assert mutant.caught_by
        assert not set(mutant.caught_by) & set(HAPPY_PATH)


def test_an_edit_that_does_not_fit_is_told(tmp_path: Path) -> None:
    (tmp_path / "here.py").write_text("a = 1\na = 1\n")
    twice, nowhere = Edit("here.py", "a = 1\n", ""), Edit("gone.py", "a", "b")
    mutant = Mutant("m", "why", (twice, nowhere), ())
    assert mutant.misfits(tmp_path) == [
        "m: here.py holds 'a = 1' 2 times",
        "m: gone.py holds 'a' 0 times",
    ]
    with pytest.raises(AssertionError, match="exactly once"):
        twice.apply(tmp_path)


PASSED, FAILED = Run(0, ""), Run(1, "F.\n\nFAILED tests/a.py::test_a[1] - it failed\n")
CAUGHT = Mutant("m", "why", (), ("tests/a.py::test_a",))
MISSED = Mutant("m", "why", (), ("tests/a.py::test_a", "tests/a.py::test_b"))


@pytest.mark.parametrize(
    ("mutant", "demo", "happy_path", "catchers", "is_good"),
    [
        (CAUGHT, PASSED, PASSED, FAILED, True),
        (CAUGHT, PASSED, PASSED, PASSED, False),
        (CAUGHT, FAILED, PASSED, FAILED, False),
        (CAUGHT, PASSED, FAILED, FAILED, False),
        (MISSED, PASSED, PASSED, FAILED, False),
        # Interrupted, as by a file that cannot be imported: no test has said anything.
        (CAUGHT, PASSED, PASSED, Run(2, FAILED.output), False),
    ],
)
def test_a_fault_is_caught_by_all_that_are_named_and_by_nothing_else(
    mutant: Mutant, demo: Run, happy_path: Run, catchers: Run, is_good: bool
) -> None:
    assert Verdict(mutant, demo, happy_path, catchers, 1.0).is_good == is_good
