"""Progress of what takes long: a bar while somebody watches, else a line at each end."""

import logging
import sys

from baton.common.progress import Progress

log = logging.getLogger(__name__)


def shown_progress() -> Progress:
    """Told from any one thread at a time."""
    return _bar() if sys.stderr.isatty() else _lines


def _lines(what: str, done: int, total: int) -> None:
    if done == total:
        log.info("%s: %d of %d", what, done, total)


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    bar = Bar(console=Console(stderr=True), transient=True)
    tasks: dict[str, TaskID] = {}

    def advance(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
            bar.start()
        bar.update(tasks[what], completed=done)
        if done == total:
            bar.stop()

    return advance
