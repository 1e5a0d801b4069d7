"""`make mutation`: plants each fault in a copy of the tree, and tells who notices.

A fault is caught when the demo and the happy path pass with it, and each test that is named for it
fails. Exit 1 if any is not, or can no longer be planted. Names as arguments pick some.

The copies are run in place of the installed checkout: PYTHONPATH names the copy's `typings/`, whose
links lead to its parts. That this is so is checked in each copy, and once by a fault that the demo
and the happy path must see.
"""

# ruff: noqa: T201 (a command speaks)

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mutation.mutant import Mutant
from mutation.mutants import HAPPY_PATH, MUTANTS, VISIBLE
from support.house import ROOT

PARALLEL: Final = 2
RUN_LIMIT_S: Final = 240
SHOWN_LINES: Final = 25
# pytest's own exit code for tests that ran and failed; anything else is no verdict.
TESTS_FAILED: Final = 1

ORIGINS: Final = """
import importlib.util, sys
from pathlib import Path
root = Path(sys.argv[1])
links = root / "typings" / "baton"
names = [
    "baton." + ".".join(path.relative_to(links).with_suffix("").parts)
    for part in sorted(links.iterdir())
    for path in sorted(part.rglob("*.py"))
    if path.stem not in ("__init__", "__main__")
]
# Parents are imported for this, the modules themselves are not.
found = {name: importlib.util.find_spec(name).origin for name in names}
outside = {name: origin for name, origin in found.items() if not Path(origin).is_relative_to(root)}
sys.exit(f"not of the copy: {outside}" if outside or not found else 0)
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One command: whether it passed, whether it was tests that failed, what it said last."""

    code: int
    output: str

    @property
    def passed(self) -> bool:
        return self.code == 0

    @property
    def has_failed_tests(self) -> bool:
        return self.code == TESTS_FAILED

    def failed(self, node_id: str) -> bool:
        """Whether pytest's summary names this test, or one of its cases, as failed."""
        return f"\nFAILED {node_id}" in self.output

    @property
    def tail(self) -> str:
        return "\n".join(self.output.splitlines()[-SHOWN_LINES:])


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy of the tree that runs in its own place."""

    root: Path

    def demo(self) -> Run:
        return self._run([sys.executable, "-P", "examples/demo.py"])

    def pytest(self, node_ids: Sequence[str]) -> Run:
        flags = ["-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-m", ""]
        return self._run([sys.executable, "-P", "-m", "pytest", *flags, *node_ids])

    def check_origins(self) -> None:
        """Raises SystemExit unless every module of this copy is the one that an import finds."""
        run = self._run([sys.executable, "-P", "-c", ORIGINS, str(self.root)])
        if not run.passed:
            sys.exit(run.tail)

    def _run(self, command: list[str]) -> Run:
        """Ended with all its processes when it takes too long."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
        environment = {
            **kept,
            "PYTHONPATH": str(self.root / "typings"),
            "NO_COLOR": "1",
            "OMP_NUM_THREADS": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": str(self.root / ".hypothesis"),
        }
        process = subprocess.Popen(
            command,
            cwd=self.root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=RUN_LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return Run(-signal.SIGKILL, f"{output}\nno end within {RUN_LIMIT_S} s")
        return Run(process.returncode, output)


@contextmanager
def snapshot() -> Iterator[Copy]:
    """What git tracks or would track, as it is now: the tree may change while this runs."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    with tempfile.TemporaryDirectory(prefix="baton-mutation-") as folder:
        # Resolved, since origins are compared by path.
        root = Path(folder).resolve() / "as-it-is"
        for name in sorted({*listed.split("\0")} - {""}):
            source, target = ROOT / name, root / name
            if source.is_symlink() or source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target, follow_symlinks=False)
        yield Copy(root)


@contextmanager
def planted(tree: Copy, mutant: Mutant | None) -> Iterator[Copy]:
    """A copy of its own, with the fault if there is one, beside the snapshot."""
    copy = Copy(Path(tempfile.mkdtemp(dir=tree.root.parent)) / "tree")
    shutil.copytree(tree.root, copy.root, symlinks=True)
    try:
        for edit in mutant.edits if mutant is not None else ():
            edit.apply(copy.root)
        copy.check_origins()
        yield copy
    finally:
        shutil.rmtree(copy.root.parent)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was seen of one fault."""

    mutant: Mutant
    demo: Run
    happy_path: Run
    catchers: Run
    seconds: float

    @property
    def is_invisible(self) -> bool:
        return self.demo.passed and self.happy_path.passed

    @property
    def missed_by(self) -> list[str]:
        """Of the tests that are to catch it, those that do not."""
        return [test for test in self.mutant.caught_by if not self.catchers.failed(test)]

    @property
    def is_good(self) -> bool:
        return self.is_invisible and self.catchers.has_failed_tests and not self.missed_by

    def row(self) -> str:
        caught_by = [_short(test) for test in self.mutant.caught_by if self.catchers.failed(test)]
        return (
            f"{self.mutant.name:26} {_said(self.demo):8} {_said(self.happy_path):11} "
            f"{self.seconds:5.0f} s  {', '.join(caught_by) or 'NOBODY'}"
        )


HEADER: Final = f"{'fault':26} {'demo':8} {'happy path':11} {'took':>7}  caught by"


def _said(run: Run) -> str:
    return "passes" if run.passed else "NOTICES"


def _short(node_id: str) -> str:
    """The test's name, or its file's."""
    return node_id.rpartition("::")[2].rpartition("/")[2]


def judge(tree: Copy, mutant: Mutant) -> Verdict:
    """Plant the fault, and look who notices."""
    began = time.monotonic()
    with planted(tree, mutant) as copy:
        catchers = copy.pytest(mutant.caught_by)
        happy_path = copy.pytest(HAPPY_PATH)
        demo = copy.demo()
    return Verdict(mutant, demo, happy_path, catchers, time.monotonic() - began)


def check_baseline(tree: Copy, mutants: Sequence[Mutant]) -> None:
    """Without a fault all pass; with one that is to be seen, demo and happy path see it."""
    _tell("without a fault")
    with planted(tree, None) as copy:
        catching = sorted({node_id for mutant in mutants for node_id in mutant.caught_by})
        for what, run in (
            ("the tests that catch", copy.pytest(catching)),
            ("the happy path", copy.pytest(HAPPY_PATH)),
            ("the demo", copy.demo()),
        ):
            if not run.passed:
                sys.exit(f"{run.tail}\n\nerror: without any fault {what} fails already")
    _tell(f"with {VISIBLE.name}, which is to be seen")
    seen = judge(tree, VISIBLE)
    if seen.demo.passed or not seen.happy_path.has_failed_tests:
        sys.exit(f"{HEADER}\n{seen.row()}\n\nerror: what was planted is not what runs")


def picked(names: Sequence[str]) -> list[Mutant]:
    by_name = {mutant.name: mutant for mutant in MUTANTS}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        sys.exit(f"error: no fault is called {unknown[0]!r}; there are: {', '.join(by_name)}")
    return [by_name[name] for name in names] or list(MUTANTS)


def main(names: Sequence[str]) -> int:
    mutants = picked(names)
    began = time.monotonic()
    with snapshot() as tree:
        misfits = [line for mutant in (VISIBLE, *mutants) for line in mutant.misfits(tree.root)]
        if misfits:
            sys.exit("\n".join(misfits) + "\n\nerror: faults that can no longer be planted")
        check_baseline(tree, mutants)
        verdicts = judge_all(tree, mutants)
    return _conclude([verdicts[mutant.name] for mutant in mutants], time.monotonic() - began)


def judge_all(tree: Copy, mutants: Sequence[Mutant]) -> dict[str, Verdict]:
    verdicts: dict[str, Verdict] = {}
    with ThreadPoolExecutor(PARALLEL) as pool:
        for future in as_completed([pool.submit(judge, tree, mutant) for mutant in mutants]):
            verdict = future.result()
            verdicts[verdict.mutant.name] = verdict
            state = "caught" if verdict.is_good else "NOT GOOD"
            _tell(f"{len(verdicts)} of {len(mutants)}: {verdict.mutant.name}: {state}")
    return verdicts


def _conclude(verdicts: Sequence[Verdict], seconds: float) -> int:
    bad = [verdict for verdict in verdicts if not verdict.is_good]
    for verdict in bad:
        print(f"\n=== {verdict.mutant.name}: {verdict.mutant.why}")
        for run in (verdict.demo, verdict.happy_path):
            if not run.passed:
                print(run.tail)
        if verdict.missed_by:
            print(f"{verdict.catchers.tail}\nit is missed by {', '.join(verdict.missed_by)}")
    print(f"\n{HEADER}")
    for verdict in verdicts:
        print(verdict.row())
    num_good = len(verdicts) - len(bad)
    print(f"\n{num_good} of {len(verdicts)} faults are caught and show nowhere else", end="")
    print(f" ({seconds:.0f} s)")
    return 1 if bad else 0


def _tell(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
