"""`baton admin steps`: what a worker's engine did last."""

import asyncio
from typing import Annotated, Final

from cyclopts import Parameter
from cyclopts.validators import Number

from baton.cli.flags import AdminFlag, JsonFlag, WorkerArgument
from baton.cli.terminal import counted, human_seconds, show_json, show_table, tell
from baton.client.admin import DEFAULT_ADMIN, AdminClient
from baton.client.replies import StepHistory, StepSummary

DEFAULT_STEPS: Final = 20

_WAYS: Final = {True: "graph", False: "kernels", None: "host"}


def list_steps(
    worker_id: WorkerArgument,
    /,
    *,
    last: Annotated[
        int, Parameter(help="the newest so many; a worker keeps 4,096", validator=Number(gte=1))
    ] = DEFAULT_STEPS,
    admin: AdminFlag = DEFAULT_ADMIN,
    as_json: JsonFlag = False,
) -> None:
    """The last steps of a worker's engine, the newest at the end."""

    async def ask() -> StepHistory:
        async with AdminClient(admin) as client:
            return await client.steps(worker_id, last)

    history = asyncio.run(ask())
    if as_json:
        show_json(history)
        return
    show_table(
        ("step", "launched", "took", "rows", "tokens", "prompt", "by"),
        [
            (
                step.number,
                f"{human_seconds(step.age_s)} ago",
                human_seconds(step.took_s),
                step.rows,
                step.tokens,
                step.prompt_tokens,
                _WAYS[step.replayed],
            )
            for step in history.steps
        ],
    )
    tell(_summary(history.worker, history.summary))


def _summary(worker: str, found: StepSummary) -> str:
    if not found.steps:
        return f"{worker} has made no step yet"
    busy = found.busy_s / found.window_s if found.window_s > 0 else 1.0
    return (
        f"{worker}: {counted(found.steps, 'step')} in {human_seconds(found.window_s)}, "
        f"half of them within {human_seconds(found.p50_s)}, 90 % within "
        f"{human_seconds(found.p90_s)}, 99 % within {human_seconds(found.p99_s)}, the longest "
        f"{human_seconds(found.max_s)}; {found.tokens_per_s:,.0f} tokens/s, busy for {busy:.0%}"
    )
