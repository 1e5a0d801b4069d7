"""F03, F04 and F05 on real processes: an owner or a reader dies or freezes while KV crosses.

Over TCP, and with so much KV per token that a transfer is still under way when a test strikes: the
reader is held just after it posted its read, and only socket buffers go on filling.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest
import pytest_asyncio
from support import tcp_sockets
from support.devices import DEVICES
from support.oracle_model import words_per_token, write_oracle_model
from support.process_trials import Asked, Trials, ask, holder, life_of, prompt_of, who_is_at
from support.processes import ProcessCluster, ServedProcess, run_processes
from support.waiting import eventually

from baton.client.replies import Worker
from baton.common import metric_names as names
from baton.common.clock import SystemClock
from baton.common.periodic import wait_for
from baton.common.timing import DEFAULT_TIMING

pytestmark = pytest.mark.asyncio(loop_scope="module")

Figure = Callable[[str, float, str], None]

# 16 KiB of KV per token, 512 KiB per block.
SHAPE = {"num_layers": 4, "num_kv_heads": 8, "head_dim": 64}
NUM_BLOCKS = 96
PROMPT_BLOCKS = 24
PROMPT = PROMPT_BLOCKS * 32
# The contexts of some sequences at once: the oracle model copies what it reads.
SCRATCH_BYTES = 96 << 20
OUTPUT = 6
TIME_SCALE = 0.25
TIMING = DEFAULT_TIMING.scaled(TIME_SCALE)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trials(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> AsyncIterator[Trials]:
    folder = tmp_path_factory.mktemp("transfers")
    model = write_oracle_model(folder / "model", **SHAPE)
    with pytest.MonkeyPatch.context() as patch:
        # Over TCP an owner has a part in each read. UCX knows no TCP from and to GPU memory.
        if not DEVICES:
            patch.setenv("UCX_TLS", "tcp")
        async with run_processes(
            model,
            folder,
            redis_url,
            prefill=2,
            decode=2,
            time_scale=TIME_SCALE,
            num_blocks=NUM_BLOCKS,
        ) as cluster:
            trials = Trials(
                cluster, num_words=words_per_token(**SHAPE), scratch_bytes=SCRATCH_BYTES
            )
            await trials.warm_up(prompt_len=PROMPT, num_requests=12)
            yield trials


@dataclass
class InTransfer:
    """A request whose read is posted and has not ended; its reader is held there."""

    asking: "asyncio.Task[Asked]"
    owner: ServedProcess
    reader: ServedProcess

    def release(self) -> None:
        self.reader.release("d.mid_pull")


async def mid_transfer(cluster: ProcessCluster, asking: "asyncio.Task[Asked]") -> InTransfer:
    decodes = [worker for worker in cluster.workers if worker.role == "decode"]
    for worker in decodes:
        worker.arm("d.mid_pull", "wait*1")
    reader = await who_is_at(decodes, "d.mid_pull")
    return InTransfer(asking, await holder(cluster, "prefill"), reader)


async def failures(cluster: ProcessCluster, name: str, *, before: Worker) -> dict[str, int]:
    """How pulls failed on a worker since `before`."""
    now = await life_of(cluster, name)
    counted = (names.PULLS_FAILED, names.PULLS_LATE, names.PULLS_LEASE_LOST, names.FENCE_FAILURES)
    grown = {one: now.counters.get(one, 0) - before.counters.get(one, 0) for one in counted}
    return {one: count for one, count in grown.items() if count}


def expect_nothing_kept(asked: Asked) -> None:
    """The last attempt found none of the prompt's blocks in its reader's cache.

    A late transfer speaks against its pair alone: the frozen owner may be tried with another one.
    """
    assert asked.report.attempts in (2, 3)
    assert asked.report.decode_cached_tokens == 0
    # The first token may be part of it, and a reader that has no other owner computes all itself.
    assert asked.report.kv_blocks in (0, PROMPT_BLOCKS, PROMPT_BLOCKS + 1)


async def test_f03_an_owner_dies_while_its_kv_crosses(trials: Trials, figure: Figure) -> None:
    """What had arrived is in no cache, and the answer is that of the oracle."""
    cluster = trials.cluster
    async with trials.one() as history:
        asking = ask(cluster, history, prompt_of(PROMPT, random.Random(3)), max_tokens=OUTPUT)
        at = await mid_transfer(cluster, asking)
        before = await life_of(cluster, at.reader.name)
        killed_at = SystemClock().monotonic()
        at.owner.kill()
        at.release()
        asked = await at.asking
        expect_nothing_kept(asked)
        figure("F03 answer after P was killed", asked.log.times_s[-1] - killed_at, "s")

        async def missing() -> str:
            found = await failures(cluster, at.reader.name, before=before)
            return "" if found == {names.PULLS_FAILED: 1} else f"it counts {found}"

        await eventually(missing, at.reader.name)
        await cluster.restart(at.owner.name)


async def follow_quarantine(cluster: ProcessCluster, name: str) -> int:
    """Until it has begun and ended; the most blocks that it held."""
    most = 0

    async def missing() -> str:
        nonlocal most
        held = (await life_of(cluster, name)).blocks_quarantined
        most = max(most, held)
        return f"{held} blocks are quarantined" if held or not most else ""

    await eventually(missing, name, deadline_s=20.0)
    return most


@pytest.mark.parametrize(
    "frozen_s", [0.0, pytest.param(60 * TIME_SCALE, marks=pytest.mark.slow_fault)]
)
async def test_f04_an_owner_freezes_while_its_kv_crosses(
    trials: Trials, frozen_s: float, figure: Figure
) -> None:
    """The reader's own deadline fires; the blocks are used again only once nobody writes there."""
    cluster = trials.cluster
    source = random.Random(f"F04 {frozen_s}")
    async with trials.one(rest_deadline_s=30.0) as history:
        asking = ask(cluster, history, prompt_of(PROMPT, source), max_tokens=OUTPUT)
        at = await mid_transfer(cluster, asking)
        before = await life_of(cluster, at.reader.name)
        frozen_at = SystemClock().monotonic()
        at.owner.freeze()
        at.release()
        assert await follow_quarantine(cluster, at.reader.name) == PROMPT_BLOCKS
        figure("F04 quarantine, P frozen", SystemClock().monotonic() - frozen_at, "s")
        asked = await at.asking
        expect_nothing_kept(asked)
        figure("F04 answer after P froze", asked.log.times_s[-1] - frozen_at, "s")
        assert names.PULLS_LATE in await failures(cluster, at.reader.name, before=before)

        # The freed blocks are taken again, and what runs in them when the owner thaws stays right.
        for _ in range(3):
            await asyncio.gather(
                *(ask(cluster, history, prompt_of(PROMPT, source), max_tokens=2) for _ in range(4))
            )
        await wait_for(asyncio.Event(), frozen_s - (SystemClock().monotonic() - frozen_at))
        running = [
            ask(cluster, history, prompt_of(PROMPT, source), max_tokens=24) for _ in range(4)
        ]
        await wait_for(asyncio.Event(), 0.5)
        at.owner.thaw()
        await asyncio.gather(*running)
        await cluster.wait_until_attached()


async def test_f05_a_reader_freezes_for_longer_than_its_lease(
    trials: Trials, figure: Figure
) -> None:
    """The owner takes its blocks back, and the zombie reads nothing that anybody uses."""
    cluster = trials.cluster
    source = random.Random(5)
    async with trials.one(rest_deadline_s=30.0) as history:
        asking = ask(cluster, history, prompt_of(PROMPT, source), max_tokens=OUTPUT)
        at = await mid_transfer(cluster, asking)
        before, epoch = await life_of(cluster, at.reader.name), at.reader.epoch
        frozen_at = SystemClock().monotonic()
        at.reader.freeze()
        asked = await at.asking
        assert asked.report.attempts == 2
        figure("F05 answer after D froze", asked.log.times_s[-1] - frozen_at, "s")

        async def leased() -> object:
            load = await life_of(cluster, at.owner.name)
            return load.blocks_leased

        await eventually(leased, "leases of the frozen reader", deadline_s=TIMING.lease_term_s)
        figure("F05 blocks back after D froze", SystemClock().monotonic() - frozen_at, "s")
        # The owner's slots are given to others while the zombie's read of them is still open.
        for _ in range(3):
            await asyncio.gather(
                *(ask(cluster, history, prompt_of(PROMPT, source), max_tokens=2) for _ in range(4))
            )
        at.reader.thaw()
        at.release()
        await cluster.wait_until_attached()

        async def missing() -> str:
            found = await failures(cluster, at.reader.name, before=before)
            return "" if sum(found.values()) == 1 else f"its pull ended as {found}"

        await eventually(missing, at.reader.name)
        assert at.reader.epoch == epoch, "the same life goes on"
        await asyncio.gather(
            *(ask(cluster, history, prompt_of(PROMPT, source), max_tokens=2) for _ in range(4))
        )


@pytest.mark.slow_fault
async def test_f05_a_decode_worker_thaws_after_its_request_went_on_elsewhere(
    trials: Trials, figure: Figure
) -> None:
    """What the zombie still emits is of an attempt that was left, and reaches nobody."""
    cluster = trials.cluster
    async with trials.one(rest_deadline_s=30.0) as history:
        decodes = [worker for worker in cluster.workers if worker.role == "decode"]
        for worker in decodes:
            worker.arm("d.after_emit", "wait*2")
        asking = ask(cluster, history, prompt_of(PROMPT, random.Random(6)), max_tokens=OUTPUT)
        zombie = await who_is_at(decodes, "d.after_emit")
        zombie.freeze()
        asked = await asking
        assert asked.report.attempts == 2
        assert asked.report.decode_worker.partition("@")[0] != zombie.name
        figure("F05 gap, D frozen while it decodes", asked.log.longest_gap_s, "s")
        zombie.thaw()
        zombie.release("d.after_emit")
        await cluster.wait_until_attached()


async def test_f20_the_connections_under_a_transfer_are_reset(
    trials: Trials, figure: Figure
) -> None:
    """Both ends live on: the answer is computed again, and later KV crosses between them anew."""
    cluster = trials.cluster
    source = random.Random(20)
    async with trials.one(rest_deadline_s=30.0) as history:
        asking = ask(cluster, history, prompt_of(PROMPT, source), max_tokens=OUTPUT)
        at = await mid_transfer(cluster, asking)
        link = int(at.owner.said["address"].rpartition(":")[2])
        under_nixl = {
            (local, remote)
            for local, remote in tcp_sockets.between(at.reader.pid, at.owner.pid)
            if remote != link
        }
        assert under_nixl, "UCX does not read over TCP"
        reset_at = SystemClock().monotonic()
        if not tcp_sockets.reset(under_nixl):
            pytest.skip("this machine resets no connections of others")
        at.release()
        asked = await at.asking
        expect_nothing_kept(asked)
        figure("F20 answer after RST under a transfer", asked.log.times_s[-1] - reset_at, "s")

        async def apart() -> str:
            """Whether the two have not met again."""
            asked = await ask(cluster, history, prompt_of(PROMPT, source), max_tokens=2)
            report = asked.report
            met = (report.prefill_worker, report.decode_worker)
            wanted = tuple(f"{one.name}@{one.epoch}" for one in (at.owner, at.reader))
            return "" if met == wanted and report.kv_blocks else f"the last pair was {met}"

        await eventually(apart, "the pair", deadline_s=30.0)
        figure("F20 the same pair hands over again", SystemClock().monotonic() - reset_at, "s")
