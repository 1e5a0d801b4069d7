"""What the verbs write: answers to stdout, everything else to stderr."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from enum import Enum
from typing import Any, Final, TextIO

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
    """Rows on stdout; whole however narrow the terminal is, so that they can be copied."""
    _print_table(columns, rows, "", sys.stdout)


def tell(text: str) -> None:
    """A remark on stderr."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def tell_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
    """Rows on stderr."""
    _print_table(columns, rows, title, sys.stderr)


def counted(count: int, noun: str) -> str:
    """1 block, 2 blocks."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


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


def _print_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], title: str, stream: TextIO
) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream)
    if title:
        console.print(Text(title, style="bold"), soft_wrap=True)
    has_header = any(columns)
    for index, line in enumerate(_lines([columns, *rows] if has_header else rows)):
        style = "bold" if has_header and index == 0 else ""
        console.print(Text(line, style=style), soft_wrap=True)


def _lines(rows: Sequence[Sequence[object]]) -> list[str]:
    """Columns as wide as their widest cell, numbers to the right, nothing after the last cell."""
    from rich.cells import cell_len

    columns = list(zip(*rows, strict=True))
    widths = [max(cell_len(str(cell)) for cell in column) for column in columns]
    are_numbers = [any(isinstance(cell, int) for cell in column) for column in columns]
    lines = []
    for row in rows:
        cells = []
        for cell, width, is_number in zip(row, widths, are_numbers, strict=True):
            gap = " " * (width - cell_len(str(cell)))
            cells.append(f"{gap}{cell}" if is_number else f"{cell}{gap}")
        lines.append("  ".join(cells).rstrip())
    return lines


def _plain(value: object) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no JSON")
