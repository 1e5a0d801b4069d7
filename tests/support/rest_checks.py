"""What must hold of a cluster when no request runs, after whatever happened to it.

G3  Every pool is free or cached: nothing owned, leased, quarantined, or pinned without an owner.
G6  Files, threads, tasks and memory are back where they were.
G7  No process that was not killed logged a traceback or a failed assertion.
G8  What clients sent is in no log.
"""

import asyncio
import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from support.waiting import eventually

from baton.client.admin import AdminClient

if TYPE_CHECKING:
    from support.cluster import Cluster

ALLOWED_GROWTH = 0.05
# Below these a difference says nothing: allocators keep pages, a channel may be half way closed.
MEMORY_FLOOR_BYTES = 24 * 2**20
COUNT_FLOOR = 2

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

_BAD_LINES = re.compile(
    r"Traceback \(most recent call last\)|\bAssertionError\b|exception was never retrieved"
    r"|was never awaited|Exception ignored in|Fatal Python error|\bCRITICAL\b"
)


class PoolCounts(Protocol):
    """What a worker says of its slots: a `LoadReport`, or what the admin service shows of it."""

    @property
    def blocks_total(self) -> int: ...
    @property
    def blocks_free(self) -> int: ...
    @property
    def blocks_cached(self) -> int: ...
    @property
    def blocks_leased(self) -> int: ...
    @property
    def blocks_quarantined(self) -> int: ...
    @property
    def requests_running(self) -> int: ...
    @property
    def requests_waiting(self) -> int: ...
    @property
    def pinned_unowned_bytes(self) -> int: ...


def unrest(name: str, pool: PoolCounts) -> list[str]:
    """What keeps a worker from being at rest; empty when it is."""
    wanted_zero = {
        "requests running": pool.requests_running,
        "requests waiting": pool.requests_waiting,
        "blocks leased": pool.blocks_leased,
        "blocks quarantined": pool.blocks_quarantined,
        "bytes pinned by nobody": pool.pinned_unowned_bytes,
    }
    found = [f"{name}: {count} {what}" for what, count in wanted_zero.items() if count]
    at_rest = pool.blocks_free + pool.blocks_cached
    if at_rest != pool.blocks_total:
        found.append(f"{name}: {at_rest} blocks free or cached of {pool.blocks_total}")
    return found


async def expect_rest(admin: AdminClient, *, deadline_s: float = 15.0) -> None:
    """G3 of a running cluster, as its admin service shows it: also that the reports get there."""

    async def missing() -> list[str]:
        workers = await admin.workers()
        assert workers, "the router knows no worker: the check would say nothing"
        alive = [worker for worker in workers if worker.state != "gone"]
        found = [what for worker in alive for what in unrest(worker.id, worker)]
        found += [f"{worker.id}: {worker.requests} requests" for worker in alive if worker.requests]
        found += [
            f"lease {lease.transfer_id}/{lease.attempt} of {lease.owner}: {lease.state}"
            for lease in await admin.leases()
        ]
        return found

    await eventually(missing, "not at rest", deadline_s=deadline_s)


async def expect_rest_inside(cluster: "Cluster", *, deadline_s: float = 15.0) -> None:
    """G3 of a cluster in this process: counted in its own pools, and as its workers report it."""

    async def missing() -> list[str]:
        alive = [worker for worker in cluster.workers if worker not in cluster.stopped]
        assert alive, "no worker runs: the check would say nothing"
        found = [
            f"{worker.identity}: {worker.core.num_requests} requests"
            for worker in alive
            if worker.core.num_requests
        ]
        for worker in alive:
            engine = worker.engine
            at_rest = engine.pool.num_free + engine.prefix.num_evictable
            if at_rest != engine.num_blocks:
                found.append(f"{worker.identity}: {at_rest} of {engine.num_blocks} blocks at rest")
        for attached in cluster.router.fleet.workers():
            found += unrest(str(attached.identity), attached.load)
        return found

    await eventually(missing, "not at rest", deadline_s=deadline_s)


@dataclass(frozen=True, slots=True)
class Usage:
    """What one process holds. `tasks` are asyncio's, and known of the own process alone."""

    fds: int
    threads: int
    rss_bytes: int
    tasks: int = 0

    def grown_from(self, before: "Usage") -> list[str]:
        """What is more than before beyond what is allowed; empty when all is back."""
        found = []
        for what, earlier, now in (
            ("open files", before.fds, self.fds),
            ("threads", before.threads, self.threads),
            ("tasks", before.tasks, self.tasks),
        ):
            if now > earlier * (1 + ALLOWED_GROWTH) + COUNT_FLOOR:
                found.append(f"{now} {what}, {earlier} before")
        if self.rss_bytes > before.rss_bytes * (1 + ALLOWED_GROWTH) + MEMORY_FLOOR_BYTES:
            found.append(f"{self.rss_bytes >> 20} MiB, {before.rss_bytes >> 20} MiB before")
        return found


def usage(pid: int | None = None) -> Usage:
    """Of a process that runs; None: of this one, with its tasks when a loop runs."""
    proc = Path(f"/proc/{pid or os.getpid()}")
    tasks = 0
    if pid is None:
        try:
            tasks = len(asyncio.all_tasks())
        except RuntimeError:
            tasks = 0
    return Usage(
        fds=len(os.listdir(proc / "fd")),
        threads=len(os.listdir(proc / "task")),
        rss_bytes=int((proc / "statm").read_text().split()[1]) * PAGE_BYTES,
        tasks=tasks,
    )


async def expect_back_to(
    before: dict[int, Usage], what: str = "resources", *, deadline_s: float = 15.0
) -> None:
    """G6: each process (by pid) holds no more than it did."""
    assert before, "no baseline was taken: the check would say nothing"

    async def missing() -> list[str]:
        return [
            f"pid {pid}: {grown}"
            for pid, baseline in before.items()
            for grown in usage(pid).grown_from(baseline)
        ]

    await eventually(missing, f"{what} are not back", deadline_s=deadline_s)


def bad_lines(log: str) -> list[str]:
    """Lines of a log that say that our own code went wrong."""
    return [line for line in log.splitlines() if _BAD_LINES.search(line)]


def expect_clean(logs: Iterable[Path]) -> None:
    """G7: of the logs of processes that were not killed."""
    found = [f"{path.name}: {line}" for path in logs for line in bad_lines(path.read_text())]
    assert not found, "\n".join(found)


def leaks(log: str, texts: Collection[str] = (), tokens: Sequence[Sequence[int]] = ()) -> list[str]:
    """What clients sent and the log tells: texts as they are, and any three token ids in a row."""
    found = [f"text {text!r}" for text in texts if text in log]
    for prompt in tokens:
        assert len(prompt) >= 3, "a canary of fewer than three ids is in a log by chance"
        rows = {tuple(prompt[i : i + 3]) for i in range(len(prompt) - 2)}
        found += [
            f"token ids {row}"
            for row in rows
            if re.search(r"\b" + r"\D{1,3}".join(map(str, row)) + r"\b", log)
        ]
    return found


def expect_secret(
    logs: Iterable[Path], *, texts: Collection[str] = (), tokens: Sequence[Sequence[int]] = ()
) -> None:
    """G8: neither the texts nor the token ids are in any of the logs."""
    assert texts or tokens, "no canary was given: the check would say nothing"
    found = [
        f"{path.name}: {what}" for path in logs for what in leaks(path.read_text(), texts, tokens)
    ]
    assert not found, "\n".join(found)
