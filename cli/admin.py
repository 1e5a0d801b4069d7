"""`baton admin workers`: who is there, and taking one out of service and back."""

import asyncio
from dataclasses import asdict
from typing import Annotated, Final

from cyclopts import Parameter

from baton.cli.flags import AdminFlag, JsonFlag, WorkerArgument
from baton.cli.terminal import (
    counted,
    human_bytes,
    human_seconds,
    show_json,
    show_line,
    show_table,
    tell,
)
from baton.client.admin import DEFAULT_ADMIN, AdminClient
from baton.client.replies import Lease, Worker
from baton.common.errors import DeadlineExceeded, UnknownWorker
from baton.common.periodic import every

LOOK_EVERY_S: Final = 0.25
DRAIN_TIMEOUT_S: Final = 600.0


def list_workers(*, admin: AdminFlag = DEFAULT_ADMIN, as_json: JsonFlag = False) -> None:
    """All workers that the router knows, live or not."""

    async def ask() -> list[Worker]:
        async with AdminClient(admin) as client:
            return await client.workers()

    workers = asyncio.run(ask())
    if as_json:
        show_json(workers)
        return
    show_table(
        (
            "role",
            "id",
            "epoch",
            "state",
            "address",
            "pid",
            "model",
            "requests",
            "free",
            "cached",
            "blocks",
        ),
        [
            (
                worker.role,
                worker.id,
                worker.epoch,
                worker.state,
                worker.address,
                worker.pid,
                worker.model,
                worker.requests,
                worker.blocks_free,
                worker.blocks_cached,
                worker.blocks_total,
            )
            for worker in workers
        ],
    )


def show_worker(
    worker_id: WorkerArgument, /, *, admin: AdminFlag = DEFAULT_ADMIN, as_json: JsonFlag = False
) -> None:
    """All that a worker last said of itself, its counters and leases too."""

    async def ask() -> tuple[list[Worker], list[Lease]]:
        async with AdminClient(admin) as client:
            return _lives(await client.workers(), worker_id), await client.leases()

    lives, leases = asyncio.run(ask())
    shown = [
        {
            **asdict(worker),
            "leases": [lease for lease in leases if lease.owner == worker.life],
        }
        for worker in lives
    ]
    if as_json:
        # The newest life; an older one is on its way out and shows in `workers list`.
        show_json(shown[-1])
        return
    for facts in shown:
        counters, held = facts.pop("counters"), facts.pop("leases")
        facts["stalled_s"] = human_seconds(facts["stalled_s"])
        facts["pinned_unowned_bytes"] = human_bytes(facts["pinned_unowned_bytes"])
        facts["leases"] = len(held)
        rows = [*facts.items(), *sorted(counters.items())]
        show_table(("", ""), [(name, str(value)) for name, value in rows])


def drain_worker(
    worker_id: WorkerArgument,
    /,
    *,
    admin: AdminFlag = DEFAULT_ADMIN,
    wait: Annotated[bool, Parameter(help="until nothing is left on it")] = True,
    timeout: Annotated[float, Parameter(help="seconds to wait at most")] = DRAIN_TIMEOUT_S,
) -> None:
    """Give a worker nothing new and move away what it runs."""

    async def drain() -> str:
        async with AdminClient(admin) as client:
            worker = await client.drain(worker_id)
            if not wait:
                return f"{worker.life} was told to drain"
            return await _drained(client, worker, timeout)

    show_line(asyncio.run(drain()))


def resume_worker(worker_id: WorkerArgument, /, *, admin: AdminFlag = DEFAULT_ADMIN) -> None:
    """Undo a drain: the worker gets requests again."""

    async def resume() -> Worker:
        async with AdminClient(admin) as client:
            return await client.resume(worker_id)

    show_line(f"{asyncio.run(resume()).life} was told to go on")


async def _drained(client: AdminClient, drained: Worker, timeout_s: float) -> str:
    """Waits until nothing is left on that life of a worker, telling how it comes along."""
    told = left = ""
    try:
        async with asyncio.timeout(timeout_s):
            async for _ in every(LOOK_EVERY_S, asyncio.Event()):
                found = [one for one in await client.workers() if one.life == drained.life]
                if not found or found[0].state == "gone":
                    return f"{drained.life} has left the cluster"
                worker = found[0]
                if worker.state == "drained":
                    break
                left = _left(worker)
                if left != told:
                    told = left
                    tell(f"{worker.life} is {worker.state}: {left} left")
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"{drained.life} is not drained after {timeout_s:g} s ({left or 'no answer'} left); "
            "it goes on draining, `baton admin workers resume` undoes it"
        ) from error
    return f"{drained.life} is drained"


def _left(worker: Worker) -> str:
    requests = counted(worker.requests_running + worker.requests_waiting, "request")
    if not worker.blocks_leased:
        return requests
    return f"{requests} and {counted(worker.blocks_leased, 'leased block')}"


def _lives(workers: list[Worker], worker_id: str) -> list[Worker]:
    """The lives of an id, the newest last."""
    found = sorted((one for one in workers if one.id == worker_id), key=lambda one: one.epoch)
    if not found:
        known = ", ".join(sorted({worker.id for worker in workers}))
        raise UnknownWorker(
            f"the router knows no worker {worker_id!r}; it knows {known or 'none at all'}"
        )
    return found
