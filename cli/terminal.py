"""What the verbs write: answers to stdout, everything else to stderr."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, TextIO

if TYPE_CHECKING:
    from rich.table import Table


# Control characters, but for tab and newline, as the pictures that Unicode has of them.
_INERT: Final = {
    code: 0x2400 + code if code < 32 else 0xFFFD
    for code in (*range(32), *range(0x7F, 0xA0))
    if chr(code) not in "\t\n"
}


def show_line(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def show_text(text: str) -> None:
    """A piece of a streamed answer, at once; what a model says never steers the terminal."""
    sys.stdout.write(text.translate(_INERT) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def show_json(value: object) -> None:
    """Dataclasses and enums as objects and their values."""
    sys.stdout.write(json.dumps(value, default=_plain, ensure_ascii=False, indent=2) + "\n")


def show_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Rows on stdout; whole however narrow the terminal is, so that it can be piped."""
    import rich.console

    table = _table(columns, rows)
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(
            width=rich.console.Console(width=10_000).measure(table).maximum
        )
    console.print(table)


def tell(text: str) -> None:
    """A remark on stderr."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def tell_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
    """Rows on stderr."""
    table = _table(columns, rows)
    table.title = title or None
    _print_table(table, sys.stderr)


def human_bytes(count: int) -> str:
    """256 MiB, 1.5 GiB, 512 B."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{size:.1f} {unit}".replace(".0 ", " ")
        size /= 1024
    raise AssertionError("the loop ends with TiB")


def human_seconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _print_table(table: "Table", stream: TextIO) -> None:
    from rich.console import Console

    console = Console(file=stream)
    if not console.is_terminal:
        console.width = Console(width=10_000).measure(table).maximum
    console.print(table)


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", show_header=any(columns))
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    return table


def _plain(value: object) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no JSON")
