"""F28 on real processes: no more open files, no room for logs, no more memory.

Nobody ends because of it. What can be served is served right, what cannot gets one error, and when
there is room again everything is as before.
"""

import asyncio
import os
import random
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import pytest_asyncio
from support import tcp_sockets
from support.history import History
from support.oracle_model import write_oracle_model
from support.process_trials import Asked, Trials, ask, oracle_of, prompt_of
from support.processes import ProcessCluster, ServedProcess, run_processes
from support.rest_checks import expect_rest
from support.waiting import eventually

from baton.client.client import BatonClient
from baton.client.failures import RouterUnreachable
from baton.common.errors import DeadlineExceeded, InternalError, NoCapacity, WorkerLost

pytestmark = pytest.mark.asyncio(loop_scope="module")

Figure = Callable[[str, float, str], None]

PROMPT = 100
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# Of the network namespace in which a test takes ports away.
OWN_PORTS = "40000 40999"
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trials(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> AsyncIterator[Trials]:
    folder = tmp_path_factory.mktemp("exhausted")
    model = write_oracle_model(folder / "model")
    async with run_processes(model, folder, redis_url) as cluster:
        trials = Trials(cluster)
        await trials.warm_up(prompt_len=PROMPT)
        yield trials


@contextmanager
def no_more_files(process: ServedProcess) -> Iterator[None]:
    """It may open nothing: numbers below three are taken, and it keeps what it has."""
    soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (soft, hard))


async def served(cluster: ProcessCluster, history: History, mode: str) -> None:
    """Until an answer is computed in that mode; every one of them is right."""
    source = random.Random(len(history.requests))

    async def missing() -> str:
        asked = await ask(cluster, history, prompt_of(PROMPT, source), max_tokens=8)
        found = asked.finish.mode.value if asked.finish is not None else f"{asked.log.ends}"
        return "" if found == mode else f"the last answer was {found}"

    await eventually(missing, f"answers in mode {mode}", deadline_s=30.0)


async def test_f28_a_router_without_files_serves_whom_it_knows(trials: Trials) -> None:
    """New connections wait or are refused; those that exist are served; then all are."""
    cluster = trials.cluster
    async with trials.one(allowed=[RouterUnreachable, DeadlineExceeded]) as history:
        source = random.Random(1)
        with no_more_files(cluster.router):
            known = await ask(cluster, history, prompt_of(PROMPT, source), max_tokens=8)
            assert known.finish is not None
            strangers: list[Asked] = []
            for _ in range(3):
                async with BatonClient(cluster.client.address) as client:
                    prompt = prompt_of(PROMPT, source)
                    asking = ask(
                        cluster, history, prompt, max_tokens=8, deadline_s=1.0, client=client
                    )
                    strangers.append(await asking)
            assert any(asked.finish is None for asked in strangers), "there were files left"
        async with BatonClient(cluster.client.address) as client:

            async def missing() -> object:
                prompt = prompt_of(PROMPT, source)
                asked = await ask(cluster, history, prompt, max_tokens=8, client=client)
                return asked.log.ends if asked.finish is None else ""

            await eventually(missing, "a new client", deadline_s=15.0)
        assert len(cluster.router.lives) == 1


async def test_f28_a_reader_without_files_computes_prompts_itself(trials: Trials) -> None:
    """It cannot connect to a new owner; the answers come, and KV crosses again once it can."""
    cluster = trials.cluster
    async with trials.one(allowed=[NoCapacity]) as history:
        with no_more_files(cluster["d0"]):
            cluster["p0"].kill()
            await cluster.restart("p0")
            await served(cluster, history, "local")
        await served(cluster, history, "disagg")
        assert len(cluster["d0"].lives) == 1


@contextmanager
def no_more_memory(process: ServedProcess) -> Iterator[None]:
    """Its address space may not grow."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
    soft, hard = resource.prlimit(process.pid, resource.RLIMIT_AS)
    resource.prlimit(process.pid, resource.RLIMIT_AS, (pages * PAGE_BYTES, hard))
    try:
        yield
    finally:
        resource.prlimit(process.pid, resource.RLIMIT_AS, (soft, hard))


@pytest.mark.slow_fault
async def test_f28_a_router_without_memory_refuses_and_comes_back(
    redis_url: str, tmp_path: Path
) -> None:
    """A flood finds no room: right tokens or one error each, no exit, and soon all is well."""
    model = write_oracle_model(tmp_path / "model")
    folder = tmp_path / "cluster"
    folder.mkdir()
    history, source = History(), random.Random(4)
    async with run_processes(model, folder, redis_url) as cluster:
        await served(cluster, history, "disagg")
        with no_more_memory(cluster.router):
            flood = [
                ask(cluster, history, prompt_of(3000, source), max_tokens=50) for _ in range(40)
            ]
            answers = await asyncio.gather(*flood)
        assert any(asked.finish is None for asked in answers), "there was memory left"
        await cluster.wait_until_attached()
        await served(cluster, history, "disagg")
        # Nobody is told that the request is wrong. INTERNAL is what gRPC's own code says.
        allowed = [NoCapacity, WorkerLost, RouterUnreachable, InternalError]
        history.check(oracle_of(), allowed=allowed)
        await expect_rest(cluster.admin)
        assert [len(process.lives) for process in cluster.processes] == [1, 1, 1]
        assert cluster.router.is_alive


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 256 KiB at `folder`; needs root."""
    mounting = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mounting, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow_fault
async def test_f28_a_full_disk_costs_log_lines_and_nothing_else(
    tmp_path: Path, redis_url: str
) -> None:
    model = write_oracle_model(tmp_path / "model")
    folder = tmp_path / "disk"
    folder.mkdir()
    history, source = History(), random.Random(3)
    with small_disk(folder):
        async with run_processes(model, folder, redis_url, log_level="DEBUG") as cluster:
            await ask(cluster, history, prompt_of(PROMPT, source), max_tokens=8)
            junk = folder / "junk"
            with suppress(OSError), junk.open("wb", 0) as file:
                while True:
                    file.write(bytes(1024))
            # Streams that break and come back are what processes write lines about.
            cluster["d0"].freeze()
            stuck = ask(cluster, history, prompt_of(PROMPT, source), max_tokens=8)
            done, _ = await asyncio.wait([stuck], timeout=1.0)
            assert not done
            cluster["d0"].thaw()
            await asyncio.gather(
                stuck,
                *(ask(cluster, history, prompt_of(PROMPT, source), max_tokens=8) for _ in range(8)),
            )
            assert os.statvfs(folder).f_bavail == 0, "the disk was not full"
            junk.unlink()
            written = len(cluster.router.log_text)
            await served(cluster, history, "disagg")
            cluster["p0"].terminate()
            assert await cluster["p0"].wait_until_ended() == 0
            await cluster.restart("p0")
            assert len(cluster.router.log_text) > written, "it writes lines again"
            history.check(oracle_of())
            await cluster.expect_rest()
            assert [len(process.lives) for process in cluster.processes] == [2, 1, 1]


def is_in_own_network() -> bool:
    return PORT_RANGE.read_text().split() == OWN_PORTS.split()


@pytest.mark.slow_fault
async def test_f28_no_port_is_left_to_dial_from() -> None:
    """`in_a_network_of_its_own`, in one: its ports are nobody else's."""
    inner = f"{__file__}::test_f28_in_a_network_of_its_own"
    running = f"exec {sys.executable} -P -m pytest -m '' -p no:cacheprovider {inner}"
    setting = f"ip link set lo up && echo {OWN_PORTS} > {PORT_RANGE}"
    ran = await asyncio.to_thread(
        subprocess.run,
        ["unshare", "--net", "sh", "-c", f"{setting} && {running}"],
        check=False,
        capture_output=True,
        text=True,
    )
    if "Operation not permitted" in ran.stderr:
        pytest.skip("needs the right to make a network namespace")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "passed" in ran.stdout
    assert "skipped" not in ran.stdout


@contextmanager
def no_more_ports() -> Iterator[None]:
    """The two ports that a connection may start from are taken; those that exist are let be."""
    PORT_RANGE.write_text("41000 41001")
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 41000))
        other.bind(("127.0.0.1", 41001))
        yield
    PORT_RANGE.write_text(OWN_PORTS)


@pytest.mark.slow_fault
async def test_f28_in_a_network_of_its_own(tmp_path: Path, redis_url: str) -> None:
    """A link that broke cannot be dialled: prompts are computed where they are decoded."""
    if not is_in_own_network():
        pytest.skip("runs inside of test_f28_no_port_is_left_to_dial_from")
    model = write_oracle_model(tmp_path / "model")
    folder = tmp_path / "cluster"
    folder.mkdir()
    history = History()
    async with run_processes(model, folder, redis_url, time_scale=0.2) as cluster:
        await served(cluster, history, "disagg")
        with no_more_ports():
            link = int(cluster["p0"].said["address"].rpartition(":")[2])
            both = tcp_sockets.between(cluster["d0"].pid, cluster["p0"].pid)
            assert tcp_sockets.reset({(local, remote) for local, remote in both if remote == link})
            await served(cluster, history, "local")
        await served(cluster, history, "disagg")
        history.check(oracle_of(), allowed=[NoCapacity])
        await cluster.expect_rest()
        assert [len(process.lives) for process in cluster.processes] == [1, 1, 1]
