"""`baton bench engine`: what the engine reaches on this GPU, against its limits and vLLM.

The measuring is `baton.engine.bench`, which also runs without this command's dependencies.
"""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from baton.cli.bench_kernels import show, watched
from baton.cli.flags import JsonFlag
from baton.engine.bench.runner import GROUPS, run_groups
from baton.kernels.bench.figures import missed
from baton.kernels.bench.runner import chosen_groups, start_report


def bench_engine(
    *,
    only: Annotated[str, Parameter(help=f"some of {','.join(GROUPS)}")] = "",
    out: Annotated[Path | None, Parameter(help="a file for the JSON, written as it grows")] = None,
    commit: Annotated[str, Parameter(help="of the code, where there is no git")] = "",
    strict: Annotated[
        bool, Parameter(negative="", help="exit with 1 if a target is missed")
    ] = False,
    as_json: JsonFlag = False,
) -> int:
    """Measure steps of Llama-3.1-8B with random weights on this machine's GPU, alone on it.

    vLLM's column was recorded once, on another H200; all else is of this run.
    """
    names = chosen_groups(only, GROUPS)
    report = start_report(commit=commit)
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
