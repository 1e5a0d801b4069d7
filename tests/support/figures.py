"""What tests of faults measure: shown at the end of a run, and written down when asked."""

from collections.abc import Callable
from dataclasses import dataclass, field

Figure = Callable[[str, float, str], None]
"""The fixture `figure`: `figure("F01: gap in the stream", 0.8, "s")`."""


@dataclass
class Figures:
    """By name. Of several values of one name the largest counts: the worst."""

    values: dict[str, tuple[float, str]] = field(default_factory=dict)

    def __call__(self, name: str, value: float, unit: str) -> None:
        worst, known_unit = self.values.get(name, (value, unit))
        assert unit == known_unit, f"{name} is measured in {known_unit} and in {unit}"
        self.values[name] = (max(worst, value), unit)

    def rows(self) -> list[tuple[str, float, str]]:
        return [(name, value, unit) for name, (value, unit) in sorted(self.values.items())]
