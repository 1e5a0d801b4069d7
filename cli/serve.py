"""`baton serve`: one process of a cluster, from its flags to its last breath.

    start → ready file → serve → SIGTERM or SIGINT → drain → stop
                               → the worker failed → stop, exit code 1

A second signal ends the process at once. Before it serves there is nothing to drain, and a signal
has its usual effect.
"""

import asyncio
import json
import logging
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import uvloop
from cyclopts import Parameter

from baton.cli.config_flags import with_flags
from baton.cli.model_folder import resolve_model
from baton.cli.progress import shown_progress
from baton.common import failpoints
from baton.common.clock import SystemClock
from baton.common.config import RouterConfig, WorkerConfig, load
from baton.common.errors import BatonError
from baton.common.log import set_up_logging
from baton.common.progress import Progress
from baton.common.sampling import Role

if TYPE_CHECKING:
    from baton.worker.server import WorkerServer

log = logging.getLogger(__name__)

ConfigFile = Annotated[
    Path | None, Parameter(name="--config", help="YAML file; flags and BATON_* come before it")
]
ReadyFile = Annotated[
    Path | None, Parameter(help="written as JSON once this process serves: pid and addresses")
]
ModelArgument = Annotated[
    str | None, Parameter(help="Hugging Face folder, or ORG/NAME from the hub")
]


class WorkerBuilder(Protocol):
    """Makes the server of a role."""

    def __call__(
        self, config: WorkerConfig, model_folder: Path, /, *, progress: Progress
    ) -> "WorkerServer": ...


class Server(Protocol):
    """What a process serves: a RouterServer or a WorkerServer."""

    async def start(self) -> None: ...

    async def drain(self) -> None: ...

    async def stop(self) -> None: ...


@with_flags(RouterConfig)
def router(*, config_file: ConfigFile = None, ready_file: ReadyFile = None, **flags: Any) -> int:
    """The router: OpenAI over HTTP, InferenceService and AdminService over gRPC."""
    from baton.router.server import RouterServer

    config = load(RouterConfig, flags, config_file)
    set_up_logging(config.log_level, "router")
    failpoints.install(config.failpoints, SystemClock())
    if config.model is not None:
        config = config.model_copy(update={"model": str(resolve_model(config.model))})

    async def serve() -> int:
        server = RouterServer(config)

        def addresses() -> dict[str, Any]:
            return {
                "host": config.host,
                "http_port": server.http_port,
                "grpc_port": server.grpc_port,
                "admin_port": server.admin_port,
            }

        return await _serve(server, addresses, ready_file)

    return uvloop.run(serve())


@with_flags(WorkerConfig)
def prefill(
    model: ModelArgument = None,
    /,
    *,
    config_file: ConfigFile = None,
    ready_file: ReadyFile = None,
    **flags: Any,
) -> int:
    """A prefill worker: it reads prompts and hands their KV over."""
    from baton.prefill_worker.service import prefill_server

    config = load(WorkerConfig, {**flags, "model": model}, config_file)
    return _serve_worker(config, Role.PREFILL, prefill_server, ready_file)


@with_flags(WorkerConfig)
def decode(
    model: ModelArgument = None,
    /,
    *,
    config_file: ConfigFile = None,
    ready_file: ReadyFile = None,
    **flags: Any,
) -> int:
    """A decode worker: it pulls the KV of a prompt and writes the answer."""
    from baton.decode_worker.service import decode_server

    config = load(WorkerConfig, {**flags, "model": model}, config_file)
    return _serve_worker(config, Role.DECODE, decode_server, ready_file)


@with_flags(WorkerConfig)
def unified(
    model: ModelArgument = None,
    /,
    *,
    config_file: ConfigFile = None,
    ready_file: ReadyFile = None,
    **flags: Any,
) -> int:
    """A unified worker: it reads prompts and writes their answers, both in one batch."""
    from baton.decode_worker.service import unified_server

    config = load(WorkerConfig, {**flags, "model": model}, config_file)
    return _serve_worker(config, Role.UNIFIED, unified_server, ready_file)


def write_ready_file(path: Path, content: dict[str, Any]) -> None:
    """Written whole or not at all: whoever sees the file may read it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def _serve_worker(
    config: WorkerConfig, role: Role, build: WorkerBuilder, ready_file: Path | None
) -> int:
    set_up_logging(config.log_level, config.worker_id or role.value)
    failpoints.install(config.failpoints, SystemClock())
    folder = resolve_model(config.model, config.revision)

    async def serve() -> int:
        server = build(config, folder, progress=shown_progress())

        def addresses() -> dict[str, Any]:
            return {
                "worker_id": server.identity.worker_id,
                "epoch": server.identity.epoch,
                "role": role.value,
                "address": server.address,
                "blocks_total": server.engine.num_blocks,
            }

        return await _serve(server, addresses, ready_file, failed=server.failed)

    return uvloop.run(serve())


async def _serve(
    server: Server,
    addresses: Callable[[], dict[str, Any]],
    ready_file: Path | None,
    *,
    failed: Callable[[], Coroutine[Any, Any, BatonError]] | None = None,
) -> int:
    await server.start()
    stopping = _on_signals()
    if ready_file is not None:
        write_ready_file(ready_file, {"pid": os.getpid(), **addresses()})
    asked = asyncio.create_task(stopping.wait())
    ends: set[asyncio.Task[Any]] = {asked}
    if failed is not None:
        failing = asyncio.create_task(failed())
        ends.add(failing)
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    if asked.done():
        for task in ends:
            task.cancel()
        await server.drain()
        await server.stop()
        return 0
    asked.cancel()
    await server.stop()
    raise failing.result()


def _on_signals() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; the second ends the process at once."""
    stopping = asyncio.Event()

    def take(number: signal.Signals) -> None:
        if stopping.is_set():
            log.warning("second %s: ending at once", number.name)
            # Not sys.exit: a drain that hangs must not keep the process.
            os._exit(128 + number)
        log.info("%s: draining", number.name)
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, take, number)
    return stopping
