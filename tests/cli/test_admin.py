"""`baton admin` on a real cluster: leases listed and reaped, workers drained and resumed."""

import asyncio
import json
import subprocess
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from support.cluster import Cluster, run_cluster, transports
from support.command import baton
from support.fault_transport import FaultScript, faulty
from support.faults import Hold
from support.history import History, RequestLog
from support.oracle_model import write_oracle_model
from support.rest_checks import expect_rest_inside
from support.waiting import eventually

from baton.cli.admin_leases import pick
from baton.client.admin import AdminClient
from baton.client.client import BatonClient
from baton.client.replies import Lease
from baton.common.errors import InvalidRequest, UnknownRequest
from baton.common.failpoints import armed
from baton.common.ids import RequestKey, TransferId
from baton.common.messages import PrefillJob, Submit
from baton.common.metric_names import KV_BYTES_PULLED, LEASES_REAPED, MOVED_IN
from baton.common.sampling import SamplingParams
from baton.engine.oracle import oracle_answer

VOCAB = 512
PROMPT = [5 + index % 300 for index in range(200)]
ORPHAN = TransferId(bytes.fromhex("abcd" * 8))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_oracle_model(tmp_path_factory.mktemp("oracle") / "model", max_model_len=8192)


def oracle(log: RequestLog) -> list[int]:
    return oracle_answer(log.prompt, log.max_tokens, VOCAB)


def at(cluster: Cluster) -> str:
    return f"127.0.0.1:{cluster.router.admin_port}"


async def admin(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, while this process goes on serving."""
    return await asyncio.to_thread(baton, "admin", *arguments, "--admin", at(cluster))


async def told(cluster: Cluster, *arguments: str) -> Any:
    """What the command answers as JSON; it must succeed."""
    done = await admin(cluster, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


async def ask(cluster: Cluster, log: RequestLog) -> None:
    async with BatonClient(f"127.0.0.1:{cluster.router.grpc_port}") as client:
        await log.follow(
            client.generate(
                list(log.prompt),
                max_tokens=log.max_tokens,
                request_id=log.id,
                temperature=0.0,
                ignore_eos=True,
            )
        )


def open_orphan(cluster: Cluster) -> None:
    """A prompt in the name of the router, which itself knows nothing of it: nobody will pull."""
    prefill, decode = cluster.prefills[0], cluster.decodes[0]
    cluster.router.fleet.send(
        prefill.identity,
        Submit(
            key=RequestKey(ORPHAN, 1),
            prompt_tokens=PROMPT,
            sampling=SamplingParams(max_tokens=8),
            tenant_key=b"",
            age_s=0.0,
            time_left_s=60.0,
            job=PrefillJob(decode.identity, b"grant"),
            request_id="forgotten",
        ),
    )


async def wait_for_leases(client: AdminClient, count: int) -> list[Lease]:
    async def missing() -> str:
        found = await client.leases()
        return "" if len(found) == count else f"{len(found)} leases, not {count}"

    await eventually(missing, "leases")
    return await client.leases()


async def test_a_lease_that_nobody_wants_is_shown_and_reaped(model: Path, redis_url: str) -> None:
    # A first term that outlives the commands.
    async with (
        run_cluster(model, redis_url, time_scale=2.0) as cluster,
        AdminClient(at(cluster)) as client,
    ):
        open_orphan(cluster)
        await wait_for_leases(client, 1)
        [shown] = await told(cluster, "leases")
        assert shown["transfer_id"] == ORPHAN.hex()
        assert shown["attempt"] == 1
        assert shown["owner"] == str(cluster.prefills[0].identity)
        assert shown["reader"] == str(cluster.decodes[0].identity)
        assert shown["router"] == cluster.router.router_id
        assert shown["request_id"] == "forgotten"
        assert shown["blocks"] == -(-len(PROMPT) // 32)
        assert shown["bytes"] == shown["blocks"] * cluster.prefills[0].engine.arena.block_bytes
        assert (shown["state"], shown["why"]) == ("open", "prefill")

        table = await admin(cluster, "leases", "reap", "--dry-run")
        assert f"{ORPHAN.hex()}/1" in table.stdout
        assert "1 lease would be ended" in table.stderr
        assert len(await client.leases()) == 1

        [reaped] = await told(cluster, "leases", "reap")
        assert reaped["transfer_id"] == ORPHAN.hex()
        await wait_for_leases(client, 0)
        await expect_rest_inside(cluster)
        assert await told(cluster, "leases", "reap") == []

        gone = await admin(cluster, "leases", "reap", "abcd")
        assert gone.returncode == 4
        assert "no lease begins with 'abcd'" in gone.stderr


async def test_a_request_whose_lease_is_reaped_is_answered_all_the_same(
    model: Path, redis_url: str
) -> None:
    script, hold, history = FaultScript(), Hold(), History()
    factory = faulty(transports("memory"), script)
    async with (
        run_cluster(model, redis_url, factory=factory, time_scale=2.0) as cluster,
        AdminClient(at(cluster)) as client,
    ):
        script.next(hold)
        log = history.submit("held", PROMPT, max_tokens=20, deadline_s=60.0)
        asking = asyncio.create_task(ask(cluster, log))
        [lease] = await wait_for_leases(client, 1)
        assert (lease.request_id, lease.attempt) == ("held", 1)
        assert await client.reap(dry_run=True) == [], "its request is known: no orphan"
        [reaped] = await client.reap(pick([lease], [lease.id[:7]]))
        assert reaped.id == lease.id
        await asking
        hold.release()
        history.check(oracle)
        await expect_rest_inside(cluster)
        [p0] = [worker for worker in await client.workers() if worker.id == "p0"]
        assert p0.counters[LEASES_REAPED] == 1


async def test_a_drained_worker_hands_over_what_it_runs_and_comes_back(
    model: Path, redis_url: str
) -> None:
    history = History()
    async with (
        run_cluster(model, redis_url, decode=2) as cluster,
        AdminClient(at(cluster)) as client,
    ):
        log = history.submit("moved", PROMPT, max_tokens=4000, deadline_s=60.0)
        asking = asyncio.create_task(ask(cluster, log))

        async def missing() -> str:
            return "" if len(log.tokens) > 5 else "no tokens"

        # However fast the machine is, the request outlasts the drain.
        with armed("d.after_emit", lambda: Event().wait(0.01)):
            await eventually(missing, "the request")
            running = next(one for one in cluster.decodes if one.core.num_requests)
            other = next(one for one in cluster.decodes if one is not running)
            name = running.identity.worker_id
            drained = await admin(cluster, "workers", "drain", name)
            assert (drained.returncode, drained.stdout) == (0, f"{running.identity} is drained\n")
            assert not asking.done(), "it was to run on elsewhere"
            assert running.core.num_requests == 0
            assert other.core.num_requests == 1

        again = await admin(cluster, "workers", "drain", name, "--no-wait")
        assert (again.returncode, again.stdout) == (0, f"{running.identity} was told to drain\n")
        shown = await told(cluster, "workers", "show", name)
        assert (shown["state"], shown["draining"]) == ("drained", True)
        assert shown["leases"] == []
        [target] = [one for one in await client.workers() if one.life == str(other.identity)]
        assert target.counters[KV_BYTES_PULLED] > 0
        assert target.counters[MOVED_IN] == 1
        await asking
        history.check(oracle)

        back = await admin(cluster, "workers", "resume", name)
        assert (back.returncode, back.stdout) == (0, f"{running.identity} was told to go on\n")

        async def not_ready() -> list[str]:
            return [one.state for one in await client.workers() if one.state != "ready"]

        await eventually(not_ready, "the drain is not undone")
        assert (await admin(cluster, "workers", "resume", name)).returncode == 0
        table = await admin(cluster, "workers", "show", other.identity.worker_id)
        assert MOVED_IN in table.stdout
        await expect_rest_inside(cluster)


async def test_a_drain_with_nowhere_to_go_is_waited_for_until_its_time_is_up(
    model: Path, redis_url: str
) -> None:
    history = History()
    async with run_cluster(model, redis_url) as cluster:
        log = history.submit("stays", PROMPT, max_tokens=4000, deadline_s=60.0)
        asking = asyncio.create_task(ask(cluster, log))

        async def missing() -> str:
            return "" if log.tokens else "no tokens"

        name = str(cluster.decodes[0].identity)
        # However fast the machine is, the request outlasts the drain.
        with armed("d.after_emit", lambda: Event().wait(0.01)):
            await eventually(missing, "the request")
            late = await admin(cluster, "workers", "drain", "d0", "--timeout", "3")
        assert (late.returncode, late.stdout) == (1, "")
        *progress, error = late.stderr.splitlines()
        assert f"{name} is draining: 1 request left" in progress
        assert f"{name} is not drained after 3 s (1 request left)" in error
        assert (await admin(cluster, "workers", "resume", "d0")).returncode == 0
        await asking
        history.check(oracle)


async def test_a_worker_that_is_not_there_is_exit_code_4_and_names_those_that_are(
    model: Path, redis_url: str
) -> None:
    async with run_cluster(model, redis_url) as cluster:
        for verb in ("drain", "resume", "show"):
            failed = await admin(cluster, "workers", verb, "nobody")
            assert failed.returncode == 4
            assert "'nobody'" in failed.stderr
            assert "d0, p0" in failed.stderr
            assert failed.stdout == ""
        assert {one.load.draining for one in cluster.router.fleet.workers()} == {False}


def lease(id_: str) -> Lease:
    transfer, attempt = id_.split("/")
    numbers = dict.fromkeys(("blocks", "bytes"), 1)
    return Lease(
        transfer_id=transfer,
        attempt=int(attempt),
        owner="p0@1",
        reader="d0@1",
        age_s=1.0,
        expires_in_s=1.0,
        state="open",
        **numbers,
    )


def test_leases_are_picked_by_id_or_a_beginning_that_is_one_leases_alone() -> None:
    found = [lease("abcd/1"), lease("abcd/12"), lease("abff/1"), lease("0123/1")]
    assert pick(found, ["0"]) == [found[3]]
    assert pick(found, ["abcd/1", "abf"]) == [found[0], found[2]]
    assert pick(found, ["0123/1", "012"]) == [found[3]]
    with pytest.raises(InvalidRequest, match=r"3 leases begin with 'ab'.*abcd/12"):
        pick(found, ["ab"])
    for nowhere in ("f", "", "abcd/1 "):
        with pytest.raises(UnknownRequest, match="no lease begins with"):
            pick(found, [nowhere])


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        (("workers", "show"), ("ID", "--admin", "--json")),
        (("workers", "drain"), ("ID", "--admin", "--no-wait", "--timeout")),
        (("workers", "resume"), ("ID", "--admin")),
        (("leases",), ("reap", "--admin", "--json")),
        (("leases", "reap"), ("IDS", "--admin", "--dry-run", "--json")),
    ],
    ids=lambda words: " ".join(words),
)
def test_each_verb_explains_itself(verb: tuple[str, ...], flags: tuple[str, ...]) -> None:
    shown = baton("admin", *verb, "--help")
    assert shown.returncode == 0, shown.stderr
    assert [flag for flag in flags if f"{flag} " not in shown.stdout] == []
