"""`baton bench kernels`: what the kernels reach on this GPU, against its memory and its rivals.

The measuring is `baton.kernels.bench`, which also runs without this command's dependencies.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from baton.cli.flags import JsonFlag
from baton.cli.terminal import show_json, show_table, tell
from baton.kernels.bench.figures import COLUMNS, missed, table_rows
from baton.kernels.bench.runner import (
    DEFAULT_BUDGET_S,
    GROUPS,
    Report,
    chosen_groups,
    run_groups,
    start_report,
)


def bench_kernels(
    *,
    only: Annotated[str, Parameter(help=f"some of {','.join(GROUPS)}")] = "",
    budget: Annotated[
        float, Parameter(help="seconds of measuring per figure", validator=Number(gt=0, lte=60))
    ] = DEFAULT_BUDGET_S,
    out: Annotated[Path | None, Parameter(help="a file for the JSON, written as it grows")] = None,
    commit: Annotated[str, Parameter(help="of the code, where there is no git")] = "",
    strict: Annotated[
        bool, Parameter(negative="", help="exit with 1 if a target is missed")
    ] = False,
    as_json: JsonFlag = False,
) -> int:
    """Measure the kernels on this machine's GPU. Ratios compare within one run alone."""
    names = chosen_groups(only)
    report = start_report(budget_s=budget, commit=commit)
    if out is not None:
        report.write(out)
    try:
        with watched() as say:
            for _ in run_groups(report, names, say):
                if out is not None:
                    report.write(out)
    finally:
        # A group that fails takes none of the figures before it along.
        show(report, as_json=as_json)
    return 1 if strict and missed(report.figures) else 0


def show(report: Report, *, as_json: bool) -> None:
    """The table, or everything as JSON; a remark on stderr names what fell short."""
    if as_json:
        show_json(report.as_json())
    else:
        show_table(COLUMNS, table_rows(report.figures))
    short = missed(report.figures)
    if short:
        tell(f"{len(short)} of {len(report.figures)} short of the target: {', '.join(short)}")


@contextmanager
def watched() -> Iterator[Callable[[str], None]]:
    """What is measured now: one line that changes while somebody watches, else one line each."""
    if not sys.stderr.isatty():
        yield tell
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield status.update
