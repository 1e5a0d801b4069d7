"""What a benchmark says: a figure against its limit, as a row of a table and as JSON. No torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

COLUMNS: Final = ("figure", "measured", "against", "ratio", "target", "", "also")
REACHED: Final = {True: "✓", False: "✗", None: ""}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured value; `limit` and `rival`, in the same unit, come from the same run."""

    # Unique in a report, such as "decode 64 x 4096".
    name: str
    # What was measured, in words.
    what: str
    achieved: float
    unit: str
    # What the hardware allows, or the task.
    limit: float | None = None
    limit_name: str = ""
    # What others reach.
    rival: float | None = None
    rival_name: str = ""
    against: Literal["limit", "rival"] = "limit"
    # Of `ratio`; None where the figure is only told.
    target: float | None = None
    # Times: the ratio is turned round, so that more is always better.
    less_is_better: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Achieved over what it is compared `against`; None where that is unknown."""
        basis = self.limit if self.against == "limit" else self.rival
        if not basis or not self.achieved:
            return None
        return basis / self.achieved if self.less_is_better else self.achieved / basis

    @property
    def reached(self) -> bool | None:
        """Whether the target is met; None without a target. An unknown ratio meets none."""
        if self.target is None:
            return None
        return self.ratio is not None and self.ratio >= self.target

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "reached": self.reached}


def table_rows(figures: Sequence[Figure]) -> list[tuple[str, ...]]:
    """A row per figure under `COLUMNS`."""
    return [_row(figure) for figure in figures]


def missed(figures: Sequence[Figure]) -> list[str]:
    """The names of the figures that fall short of their targets."""
    return [figure.name for figure in figures if figure.reached is False]


def plain_table(figures: Sequence[Figure]) -> str:
    """The table as text, where there is nothing to draw it with."""
    lines = [COLUMNS, *table_rows(figures)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        + "\n"
        for line in lines
    )


def shown(value: float, unit: str) -> str:
    """Three digits that matter: 4.21e+03 reads 4210."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 4
    return f"{value:.{digits}f} {unit}"


def _row(figure: Figure) -> tuple[str, ...]:
    limit = _named(figure.limit, figure.unit, figure.limit_name)
    rival = _named(figure.rival, figure.unit, figure.rival_name)
    against, also = (limit, rival) if figure.against == "limit" else (rival, limit)
    return (
        figure.name,
        shown(figure.achieved, figure.unit),
        against,
        "" if figure.ratio is None else f"{figure.ratio:.3f}",
        "" if figure.target is None else f"{figure.target:g}",
        REACHED[figure.reached],
        also,
    )


def _named(value: float | None, unit: str, name: str) -> str:
    return "" if value is None else f"{shown(value, unit)} {name}".rstrip()
