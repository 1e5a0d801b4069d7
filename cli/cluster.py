"""A cluster on this host: Redis, workers and a router as child processes, started and stopped.

redis → workers and router together → all ready → serving
stop: router (drains) → workers (drain) → redis, each with a deadline, then SIGKILL
"""

import asyncio
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from baton.cli.child import Child, LineSink
from baton.cli.redis_server import RedisServer
from baton.client.admin import AdminClient
from baton.client.client import BatonClient
from baton.client.replies import Worker
from baton.common.addresses import join_address
from baton.common.errors import BatonError, ConfigError, DeadlineExceeded, WorkerLost
from baton.common.periodic import every

LOOK_EVERY_S: Final = 0.05
# Above what a process allows itself: it drains for at most 30 s.
STOP_DEADLINE_S: Final = 35.0
START_DEADLINE_S: Final = 600.0

Flags = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to start. The flags are those of `baton serve`, by field name; None is left out."""

    model: str
    num_prefill: int = 1
    num_decode: int = 1
    num_unified: int = 0
    # None starts a private one.
    redis: str | None = None
    shared_flags: Flags = field(default_factory=dict)
    router_flags: Flags = field(default_factory=dict)
    worker_flags: Flags = field(default_factory=dict)
    start_deadline_s: float = START_DEADLINE_S

    def __post_init__(self) -> None:
        pair, unified = (self.num_prefill, self.num_decode), self.num_unified
        if min(*pair, unified) < 0 or (min(pair) == 0 and (max(pair) > 0 or unified == 0)):
            raise ConfigError(
                f"--prefill {pair[0]} --decode {pair[1]} --unified {unified} is no cluster that "
                "serves; start one prefill and one decode worker at least, or unified ones alone"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """Where a running cluster answers."""

    http: str
    grpc: str
    admin: str
    redis: str


class Cluster:
    """Used on one event loop. Whatever `start` brought up, `stop` takes down."""

    endpoints: Endpoints
    workers: list[Worker]

    def __init__(
        self,
        plan: Plan,
        *,
        show_line: LineSink = lambda _name, _line: None,
        say: Callable[[str], None] = lambda _text: None,
    ) -> None:
        """`show_line` gets the output of the processes, `say` how the start comes along."""
        self._plan = plan
        self._show_line = show_line
        self._say = say
        self._folder = Path(tempfile.mkdtemp(prefix="baton-"))
        self._redis: RedisServer | None = None
        self._router: Child | None = None
        self._prefill: list[Child] = []
        self._decode: list[Child] = []
        self._unified: list[Child] = []
        self.num_deaths = 0

    async def start(self) -> None:
        """Returns when requests can be served; raises the BatonError that prevented it."""
        plan = self._plan
        redis_url = plan.redis
        if redis_url is None:
            self._redis = await RedisServer.start(self._folder)
            redis_url = self._redis.url
        shared = {**plan.shared_flags, "redis": redis_url}
        worker = {**plan.worker_flags, **shared, "listen": "127.0.0.1:0"}
        for role, children, count in (
            ("prefill", self._prefill, plan.num_prefill),
            ("decode", self._decode, plan.num_decode),
            ("unified", self._unified, plan.num_unified),
        ):
            for index in range(count):
                name = f"{role}-{index}"
                flags = {**worker, "worker_id": name}
                children.append(await self._serve(name, [role, plan.model], flags))
        self._router = await self._serve("router", ["router"], {**plan.router_flags, **shared})
        try:
            async with asyncio.timeout(plan.start_deadline_s):
                await self._ready(redis_url)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"not ready within {plan.start_deadline_s:g} s: still waiting for "
                f"{', '.join(self._missing()) or 'the workers to join the router'}; give it more "
                "time with --start-timeout, or see why with --log-level INFO"
            ) from error

    async def broken(self) -> BatonError:
        """Waits until requests can no longer be served and returns why."""
        waiting = {asyncio.create_task(child.wait()): child for child in self._children()}
        try:
            while True:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for child in [waiting.pop(task) for task in done]:
                    self.num_deaths += 1
                    said = f"{child.name} (pid {child.pid}) ended with {child.how_it_ended()}"
                    if not self._can_serve():
                        return WorkerLost(said)
                    self._say(f"{said}; the others go on")
        finally:
            for task in waiting:
                task.cancel()

    async def stop(self) -> None:
        """Let running requests end, then end every process; nothing is left behind."""
        try:
            if self._router is not None:
                await self._stop(self._router)
            await asyncio.gather(*(self._stop(child) for child in self._worker_children()))
            if self._redis is not None:
                await self._redis.stop()
        finally:
            await self.kill()

    async def kill(self) -> None:
        """End every process at once; Redis last, so that nobody complains of its loss."""
        for child in reversed(self._children()):
            await child.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def router_pid(self) -> int:
        assert self._router is not None, "asked of a started cluster"
        return self._router.pid

    # --- start-up steps ---

    async def _serve(self, name: str, verb: list[str], flags: Flags) -> Child:
        program = [sys.executable, "-P", "-m", "baton.cli", "serve", *verb]
        arguments = to_arguments({**flags, "ready_file": str(self._ready_file(name))})
        return await Child.start(name, [*program, *arguments], self._show_line)

    async def _stop(self, child: Child) -> None:
        if not await child.stop(STOP_DEADLINE_S):
            self._say(f"{child.name} did not stop within {STOP_DEADLINE_S:g} s and was killed")

    async def _ready(self, redis_url: str) -> None:
        num_said = -1
        async for _ in every(LOOK_EVERY_S, asyncio.Event()):
            await self._refuse_deaths()
            missing = self._missing()
            num_ready = len(self._children()) - len(missing)
            if num_ready != num_said:
                num_said = num_ready
                self._say(f"starting: {num_ready} of {len(self._children())} processes ready")
            if not missing:
                break
        ports = _read_ready_file(self._ready_file("router"))
        self.endpoints = Endpoints(
            http=f"http://{join_address(ports['host'], ports['http_port'])}",
            grpc=join_address(ports["host"], ports["grpc_port"]),
            admin=join_address(ports["host"], ports["admin_port"]),
            redis=redis_url,
        )
        await self._joined()

    async def _joined(self) -> None:
        """Until the router has all workers and the tokenizer of their model."""
        names = {child.name for child in self._worker_children()}
        async with (
            AdminClient(self.endpoints.admin) as admin,
            BatonClient(self.endpoints.grpc) as client,
        ):
            async for _ in every(LOOK_EVERY_S, asyncio.Event()):
                await self._refuse_deaths()
                self.workers = [one for one in await admin.workers() if one.id in names]
                ready = {worker.id for worker in self.workers if worker.state == "ready"}
                if ready == names and await client.models():
                    return

    async def _refuse_deaths(self) -> None:
        for child in self._children():
            if not child.is_alive:
                await child.wait()
                self.num_deaths += 1
                raise ConfigError(
                    f"{child.name} ended while the cluster started, with {child.how_it_ended()}"
                )

    def _missing(self) -> list[str]:
        """The processes that do not serve yet."""
        return [
            child.name
            for child in self._children()
            if child.name != "redis" and not self._ready_file(child.name).exists()
        ]

    def _ready_file(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _children(self) -> list[Child]:
        """In the order of their start."""
        redis = [self._redis.child] if self._redis is not None else []
        router = [self._router] if self._router is not None else []
        return [*redis, *self._worker_children(), *router]

    def _worker_children(self) -> list[Child]:
        return [*self._prefill, *self._decode, *self._unified]

    def _can_serve(self) -> bool:
        """Redis is a hint only: its loss stops nobody."""
        assert self._router is not None, "asked of a started cluster"
        has_pair, has_unified = (
            all(any(child.is_alive for child in children) for children in needed)
            for needed in ((self._prefill, self._decode), (self._unified,))
        )
        return self._router.is_alive and (has_pair or has_unified)


def to_arguments(flags: Flags) -> list[str]:
    """Field names and values as the command line of `baton serve`."""
    arguments = []
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            arguments.append(flag)
        elif value is not None and value is not False:
            arguments.append(f"{flag}={value}")
    return arguments


def _read_ready_file(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
