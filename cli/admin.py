"""`baton admin`: what a router knows of its cluster."""

import asyncio

from baton.cli.flags import AdminFlag, JsonFlag
from baton.cli.terminal import human_bytes, human_seconds, show_json, show_table
from baton.client.admin import DEFAULT_ADMIN, AdminClient
from baton.client.replies import Lease, Worker


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


def list_leases(*, admin: AdminFlag = DEFAULT_ADMIN, as_json: JsonFlag = False) -> None:
    """Every lease of every live worker: who pins which bytes for whom, the oldest first."""

    async def ask() -> list[Lease]:
        async with AdminClient(admin) as client:
            return await client.leases()

    leases = asyncio.run(ask())
    if as_json:
        show_json(leases)
        return
    show_table(
        ("transfer", "attempt", "owner", "reader", "blocks", "bytes", "age", "expires", "state"),
        [
            (
                lease.transfer_id,
                lease.attempt,
                lease.owner,
                lease.reader,
                lease.blocks,
                human_bytes(lease.bytes),
                human_seconds(lease.age_s),
                human_seconds(lease.expires_in_s),
                lease.state,
            )
            for lease in leases
        ],
    )
