"""How far something is that takes long: told to whoever shows it."""

from collections.abc import Callable

# What it is, and how many of how many parts are done. The last call has as many done as there are.
Progress = Callable[[str, int, int], None]


def no_progress(what: str, done: int, total: int) -> None:
    """Nobody is told."""
