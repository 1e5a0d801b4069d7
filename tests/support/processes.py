"""A cluster of real processes: kill, freeze, stop and restart any of them; real Redis, real NIXL.

    async with run_processes(model, tmp_path, redis_url, prefill=2, time_scale=0.2) as cluster:
        cluster["p0"].arm("p.mid_prefill", "kill")
        log = await cluster.ask(history, prompt, max_tokens=64)
        await cluster["p0"].restart()           # the same id and address, another life

Workers are called p0, p1, ... and d0, d1, ..., the router "router". Everything a process writes is
in `logs/NAME.LIFE.log`. Whatever a test leaves running, frozen or not, is killed at the end.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.command import BATON, environment
from support.devices import device_of
from support.history import History, RequestLog
from support.rest_checks import Usage, expect_clean, expect_rest, usage
from support.waiting import eventually

from baton.cli import leash
from baton.cli.cluster import to_arguments
from baton.client.admin import AdminClient
from baton.client.client import BatonClient
from baton.client.failures import RouterUnreachable
from baton.common.failpoints import NAMES, Order

START_DEADLINE_S = 60.0
END_DEADLINE_S = 40.0
# Test models have arenas of some hundred blocks; each process has one thread for torch.
WORKER_FLAGS: Mapping[str, object] = {
    "num_blocks": 256,
    "num_threads": 1,
    "check_invariants": True,
    "log_level": "INFO",
}


@dataclass
class Life:
    """One run of a process."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    @property
    def was_killed(self) -> bool:
        return self.process.poll() == -signal.SIGKILL


class ServedProcess:
    """`baton serve ROLE`, through all its lives."""

    def __init__(self, name: str, role: str, command: list[str], folder: Path) -> None:
        self.name = name
        self.role = role
        self.lives: list[Life] = []
        self._command = command
        self._folder = folder
        self._ready_file = folder / f"{name}.json"
        self._failpoints = folder / "failpoints" / name
        self._failpoints.mkdir(parents=True)
        self._said: dict[str, Any] = {}

    @property
    def pid(self) -> int:
        return self._life.process.pid

    @property
    def is_alive(self) -> bool:
        return bool(self.lives) and self._life.is_alive

    @property
    def epoch(self) -> int:
        epoch: int = self._said["epoch"]
        return epoch

    @property
    def log_text(self) -> str:
        """Of all lives, in order."""
        return "".join(life.log.read_text() for life in self.lives)

    @property
    def said(self) -> Mapping[str, Any]:
        """The ready file of the newest life that was ready: addresses, epoch."""
        return self._said

    # --- life ---

    def start(self) -> None:
        """A new life at the address of the last one; returns before it is ready."""
        assert not self.is_alive, f"{self.name} runs already"
        self._ready_file.unlink(missing_ok=True)
        log = self._folder / "logs" / f"{self.name}.{len(self.lives) + 1}.log"
        flags = {
            **self._addresses(),
            "ready_file": str(self._ready_file),
            "failpoints": str(self._failpoints),
        }
        # Dies with this test process, however that ends.
        leashed = [sys.executable, "-I", "-S", str(leash.__file__), str(os.getpid())]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*leashed, *self._command, *to_arguments(flags)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,
            )
        self.lives.append(Life(process, log))

    async def wait_until_ready(self) -> None:
        """Until it serves; whether the router has it is the cluster's to say."""

        async def missing() -> str:
            assert self.is_alive, f"{self.name} ended at its start:\n{self._life.log.read_text()}"
            return "" if self._ready_file.exists() else "it does not serve"

        await eventually(missing, f"{self.name}", deadline_s=START_DEADLINE_S)
        self._said = json.loads(self._ready_file.read_text(encoding="utf-8"))

    def kill(self) -> None:
        """SIGKILL, and gone when this returns."""
        self._send(signal.SIGKILL)
        self._life.process.wait()

    def freeze(self) -> None:
        """SIGSTOP."""
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._send(signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM: it drains and ends by itself."""
        self._send(signal.SIGTERM)

    async def wait_until_ended(self, deadline_s: float = END_DEADLINE_S) -> int:
        """The exit code, negative for a signal."""

        async def missing() -> str:
            return "it runs" if self.is_alive else ""

        await eventually(missing, f"{self.name}", deadline_s=deadline_s)
        code = self._life.process.poll()
        assert code is not None, "it has ended"
        return code

    # --- failpoints ---

    def arm(self, name: str, order: str) -> None:
        """kill, stop, wait or raise, `*N` for the N-th time alone; now or before it starts."""
        assert name in NAMES, f"{name} is no failpoint"
        Order.parse(order, name)
        self.disarm(name)
        scratch = self._failpoints / f"{name}.new"
        scratch.write_text(f"{order}\n")
        scratch.rename(self._failpoints / f"{name}.arm")

    def disarm(self, name: str) -> None:
        """Also forgets that it was hit or released."""
        for kind in ("arm", "hit", "release"):
            (self._failpoints / f"{name}.{kind}").unlink(missing_ok=True)

    def disarm_all(self) -> None:
        for name in NAMES:
            self.disarm(name)

    def was_hit(self, name: str) -> bool:
        return (self._failpoints / f"{name}.hit").exists()

    async def wait_until_hit(self, name: str, deadline_s: float = 30.0) -> None:
        async def missing() -> str:
            return "" if self.was_hit(name) else "not reached"

        await eventually(missing, f"{self.name} at {name}", deadline_s=deadline_s)

    def release(self, name: str) -> None:
        """Let go on what waits at `name`."""
        (self._failpoints / f"{name}.release").touch()

    # --- inside ---

    @property
    def _life(self) -> Life:
        assert self.lives, f"{self.name} was never started"
        return self.lives[-1]

    def _send(self, number: signal.Signals) -> None:
        assert self.is_alive, f"{self.name} has ended: {self._life.process.poll()}"
        self._life.process.send_signal(number)

    def _addresses(self) -> dict[str, object]:
        """Any free ports for the first life, the same ones for those that follow."""
        ports = ("http_port", "grpc_port", "admin_port")
        if self.role == "router":
            return {port: self._said.get(port, 0) for port in ports}
        return {"listen": self._said.get("address", "127.0.0.1:0")}


class ProcessCluster:
    """A router and its workers; used on one event loop."""

    client: BatonClient
    admin: AdminClient

    def __init__(self, processes: list[ServedProcess]) -> None:
        self._processes = {process.name: process for process in processes}

    def __getitem__(self, name: str) -> ServedProcess:
        return self._processes[name]

    @property
    def router(self) -> ServedProcess:
        return self["router"]

    @property
    def processes(self) -> list[ServedProcess]:
        return list(self._processes.values())

    @property
    def workers(self) -> list[ServedProcess]:
        return [process for process in self.processes if process.role != "router"]

    @property
    def logs(self) -> list[Path]:
        return [life.log for process in self.processes for life in process.lives]

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.router.said['http_port']}"

    async def start(self) -> None:
        for process in self.processes:
            process.start()
        for process in self.processes:
            await process.wait_until_ready()
        self.client = BatonClient(f"127.0.0.1:{self.router.said['grpc_port']}")
        self.admin = AdminClient(f"127.0.0.1:{self.router.said['admin_port']}")
        await self.wait_until_attached()

    async def close(self) -> None:
        """Kills what still runs."""
        for process in self.processes:
            if process.is_alive:
                process.kill()
        if hasattr(self, "client"):
            await self.client.close()
            await self.admin.close()

    async def restart(self, name: str) -> None:
        """A further life of a process that has ended, unarmed; returns when it is attached."""
        process = self[name]
        process.disarm_all()
        process.start()
        await process.wait_until_ready()
        await self.wait_until_attached()

    async def wait_until_attached(self) -> None:
        """Until the router has every worker that runs as ready, and the model's tokenizer."""

        async def missing() -> list[str]:
            wanted = {(one.name, one.epoch) for one in self.workers if one.is_alive}
            try:
                workers = await self.admin.workers()
                models = await self.client.models()
            except RouterUnreachable as error:
                return [error.message]
            ready = {(one.id, one.epoch) for one in workers if one.state == "ready"}
            states = [f"{one.life} {one.state}" for one in workers]
            found = [f"no {name}@{epoch} in {states}" for name, epoch in wanted - ready]
            return found if models else [*found, "no model is served"]

        await eventually(missing, "not attached", deadline_s=START_DEADLINE_S)

    async def ask(
        self,
        history: History,
        prompt: list[int],
        *,
        max_tokens: int,
        deadline_s: float = 60.0,
        request_id: str = "",
        **sampling: Any,
    ) -> RequestLog:
        """One request, greedy unless told otherwise, logged to its end."""
        name = request_id or f"request-{len(history.requests)}"
        log = history.submit(name, prompt, max_tokens=max_tokens, deadline_s=deadline_s)
        chosen = {"temperature": 0.0, "ignore_eos": True, **sampling}
        chunks = self.client.generate(
            prompt, max_tokens=max_tokens, timeout_s=deadline_s, request_id=name, **chosen
        )
        await log.follow(chunks)
        return log

    def usage(self) -> dict[int, Usage]:
        """By pid, of all that run: the baseline of G6."""
        return {process.pid: usage(process.pid) for process in self.processes if process.is_alive}

    async def expect_rest(self, *, deadline_s: float = 15.0) -> None:
        """G3 and G7: nothing is held, and nobody that was not killed complains of itself."""
        await expect_rest(self.admin, deadline_s=deadline_s)
        self.expect_clean_logs()

    def expect_clean_logs(self) -> None:
        lives = [life for process in self.processes for life in process.lives]
        expect_clean(life.log for life in lives if not life.was_killed)


@asynccontextmanager
async def run_processes(
    model: Path,
    folder: Path,
    redis_url: str,
    *,
    prefill: int = 1,
    decode: int = 1,
    time_scale: float = 1.0,
    router_flags: Mapping[str, object] | None = None,
    **worker_flags: object,
) -> AsyncIterator[ProcessCluster]:
    """A ready cluster whose files are in `folder`, a test's own."""
    (folder / "logs").mkdir()
    shared = {"redis": redis_url, "cluster": folder.name, "time_scale": time_scale}
    workers = {**WORKER_FLAGS, **shared, **worker_flags}

    def worker(name: str, role: str) -> ServedProcess:
        flags = to_arguments({**workers, "worker_id": name, "device": device_of(role)})
        return ServedProcess(name, role, [*BATON, "serve", role, str(model), *flags], folder)

    flags = to_arguments({"log_level": "INFO", **shared, **(router_flags or {})})
    processes = [
        *(worker(f"p{index}", "prefill") for index in range(prefill)),
        *(worker(f"d{index}", "decode") for index in range(decode)),
        ServedProcess("router", "router", [*BATON, "serve", "router", *flags], folder),
    ]
    cluster = ProcessCluster(processes)
    try:
        await cluster.start()
        yield cluster
    finally:
        await cluster.close()
