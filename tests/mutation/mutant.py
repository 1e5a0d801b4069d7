"""A fault that is planted on purpose: what is changed, why it matters, and who must notice."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Edit:
    """`old` stands exactly once in `file`, a path from the root of the repository."""

    file: str
    old: str
    new: str

    def count(self, root: Path) -> int:
        """How often the old text stands in the file."""
        path = root / self.file
        return path.read_text(encoding="utf-8").count(self.old) if path.is_file() else 0

    def apply(self, root: Path) -> None:
        assert self.count(root) == 1, f"{self.file} does not hold the old text exactly once"
        path = root / self.file
        path.write_text(path.read_text(encoding="utf-8").replace(self.old, self.new), "utf-8")


@dataclass(frozen=True, slots=True)
class Mutant:
    """`caught_by`: pytest node ids, each of which fails with the fault and passes without it."""

    name: str
    why: str
    edits: tuple[Edit, ...]
    caught_by: tuple[str, ...]

    def misfits(self, root: Path) -> list[str]:
        """The edits whose text has changed since: the list would rot in silence."""
        return [
            f"{self.name}: {edit.file} holds {edit.old.strip().splitlines()[0]!r} "
            f"{edit.count(root)} times"
            for edit in self.edits
            if edit.count(root) != 1
        ]
