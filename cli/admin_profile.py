"""`baton admin profile`: a trace of what a worker's engine does in its next steps."""

import asyncio
from typing import Annotated, Final

from cyclopts import Parameter
from cyclopts.validators import Number

from baton.cli.flags import AdminFlag, JsonFlag, WorkerArgument
from baton.cli.terminal import counted, show_json, show_line
from baton.client.admin import DEFAULT_ADMIN, AdminClient
from baton.client.replies import Profile

DEFAULT_STEPS: Final = 20
MAX_STEPS: Final = 200


def start_profile(
    worker_id: WorkerArgument,
    /,
    *,
    steps: Annotated[
        int,
        Parameter(
            help="profile so many; hundreds on a GPU stop it for seconds at the end",
            validator=Number(gte=1, lte=MAX_STEPS),
        ),
    ] = DEFAULT_STEPS,
    admin: AdminFlag = DEFAULT_ADMIN,
    as_json: JsonFlag = False,
) -> None:
    """Profile the next steps of a worker's engine; a Chrome trace is written after the last."""

    async def start() -> Profile:
        async with AdminClient(admin) as client:
            return await client.start_profile(worker_id, steps)

    started = asyncio.run(start())
    if as_json:
        show_json(started)
        return
    count = counted(steps, "step")
    show_line(f"{started.worker} profiles its next {count}; the trace will be {started.path}")


def stop_profile(
    worker_id: WorkerArgument, /, *, admin: AdminFlag = DEFAULT_ADMIN, as_json: JsonFlag = False
) -> None:
    """End a profile before it has all its steps."""

    async def stop() -> Profile:
        async with AdminClient(admin) as client:
            return await client.stop_profile(worker_id)

    stopped = asyncio.run(stop())
    if as_json:
        show_json(stopped)
        return
    verb = "wrote" if stopped.is_written else "is writing"
    show_line(f"{stopped.worker} {verb} {stopped.path}")
