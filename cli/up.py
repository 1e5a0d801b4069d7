"""`baton up`: a whole cluster on this host, until Ctrl-C or SIGTERM."""

import asyncio
import json
import math
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final

from cyclopts import Parameter
from rich.console import Console

from baton.cli.child import ERROR_PREFIX
from baton.cli.cluster import START_DEADLINE_S, Cluster, Plan
from baton.cli.config_flags import with_flags
from baton.cli.model_folder import SHIPPED_MODEL, resolve_model, shipped_model
from baton.cli.preflight import check_ports, check_words
from baton.cli.serve import ModelArgument, ReadyFile, write_ready_file
from baton.cli.terminal import show_line, show_table, tell
from baton.client.admin import DEFAULT_ADMIN
from baton.client.client import DEFAULT_ROUTER
from baton.common.config import ClusterConfig, RouterConfig, WorkerConfig, load
from baton.common.log import check_level

# Each process has its own.
_PER_PROCESS: Final = ("model", "worker_id", "listen", "advertise", "max_requests")
_SHARED: Final = frozenset(ClusterConfig.model_fields)


@with_flags(RouterConfig, WorkerConfig, leave_out=_PER_PROCESS)
def up(
    model: ModelArgument = None,
    /,
    *,
    prefill: Annotated[
        int | None, Parameter(help="prefill workers [default: 1; 0 with --unified alone]")
    ] = None,
    decode: Annotated[
        int | None, Parameter(help="decode workers [default: 1; 0 with --unified alone]")
    ] = None,
    unified: Annotated[int, Parameter(help="workers that prefill and decode")] = 0,
    redis: Annotated[
        str | None, Parameter(help="URL of the Redis server [default: a private one is started]")
    ] = None,
    log_level: Annotated[str | None, Parameter(help="of all processes [default: WARNING]")] = None,
    start_timeout: Annotated[
        float, Parameter(help="seconds until the cluster must be ready")
    ] = START_DEADLINE_S,
    ready_file: ReadyFile = None,
    **flags: Any,
) -> int:
    """Run a whole cluster on this host until Ctrl-C or SIGTERM, then drain and stop it.

    MODEL is a Hugging Face folder or ORG/NAME from the hub; without one, baton-tiny is served, a
    small model that ships with Baton. Nothing outlives this process, even if it is killed.
    """
    plan = make_plan(
        model,
        num_prefill=prefill,
        num_decode=decode,
        num_unified=unified,
        flags={**flags, "redis": redis, "log_level": log_level},
        start_deadline_s=start_timeout,
    )
    return asyncio.run(_supervise(plan, ready_file))


def make_plan(
    model: str | None,
    *,
    num_prefill: int | None = None,
    num_decode: int | None = None,
    num_unified: int = 0,
    flags: dict[str, Any] | None = None,
    start_deadline_s: float = START_DEADLINE_S,
) -> Plan:
    """The plan of `baton up`: everything is checked here, before a process is started.

    Counts that are None are 1, or 0 where unified workers alone were asked for.
    Raises ConfigError for flags and environment, ModelError for the model.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    router = load(RouterConfig, _of(RouterConfig, given))
    named = model or router.model
    if named is None:
        named = str(shipped_model())
        tell(f"no MODEL given: serving {SHIPPED_MODEL}, the small model that ships with Baton")
        given = _with_defaults_of_the_shipped(given, named)
    worker = load(WorkerConfig, {**_of(WorkerConfig, given), "model": named})
    shared = {name: value for name, value in given.items() if name in _SHARED}
    shared.setdefault("log_level", router.log_level if _is_set(router, "log_level") else "WARNING")
    check_level(str(shared["log_level"]))
    redis = shared.pop("redis", router.redis if _is_set(router, "redis") else None)
    own_flags = {name: value for name, value in given.items() if name not in _SHARED}
    if num_unified > 0 and num_prefill is None and num_decode is None:
        num_prefill = num_decode = 0
    counts = {
        "num_prefill": 1 if num_prefill is None else num_prefill,
        "num_decode": 1 if num_decode is None else num_decode,
        "num_unified": num_unified,
    }
    num_workers = sum(counts.values())
    own_flags |= _gpu_share(worker, num_workers)
    threads = worker.num_threads or _threads_each(num_workers)
    plan = Plan(
        model=named,
        **counts,
        redis=redis,
        shared_flags=shared,
        router_flags=_of(RouterConfig, own_flags),
        worker_flags={**_of(WorkerConfig, own_flags), "num_threads": threads},
        start_deadline_s=start_deadline_s,
    )
    check_ports(router)
    check_words(resolve_model(worker.model, worker.revision))
    return plan


def _with_defaults_of_the_shipped(given: dict[str, Any], folder: str) -> dict[str, Any]:
    """`given`, and what suits baton-tiny where neither a flag nor the environment says otherwise.

    Its weights are bfloat16, which CPUs compute slowly: docs/decisions/0012-float32-on-cpus.md.
    """
    said = load(WorkerConfig, {**_of(WorkerConfig, given), "model": folder}).model_fields_set
    suited = {"served_model_name": SHIPPED_MODEL, "dtype": "float32"}
    return {**given, **{name: value for name, value in suited.items() if name not in said}}


def _gpu_share(worker: WorkerConfig, num_workers: int) -> dict[str, Any]:
    """Workers that nobody told how much to take share the first GPU, if there is one."""
    is_told = {"gpu_memory_share", "kv_memory", "num_blocks"} & worker.model_fields_set
    if is_told or worker.device == "cpu" or not any(Path("/dev").glob("nvidia[0-9]*")):
        return {}
    return {"gpu_memory_share": math.floor(100 / max(1, num_workers)) / 100}


def _of(kind: type[RouterConfig] | type[WorkerConfig], flags: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if name in kind.model_fields}


def _is_set(config: RouterConfig, name: str) -> bool:
    """By a flag or the environment."""
    return name in config.model_fields_set


def _threads_each(num_workers: int) -> int:
    """All workers share this host: more threads than cores would only wait for each other."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, num_workers))


async def _supervise(plan: Plan, ready_file: Path | None) -> int:
    stopping, hurrying = _on_signals()
    progress = _Progress()
    cluster = Cluster(plan, show_line=tell_output, say=progress)
    is_serving = False
    try:
        if await _ends_before(stopping, starting := asyncio.create_task(cluster.start())):
            starting.result()
            is_serving = True
            progress.end()
            if ready_file is not None:
                write_ready_file(ready_file, _description(cluster))
            _show(cluster)
            if await _ends_before(stopping, broken := asyncio.create_task(cluster.broken())):
                raise broken.result()
    finally:
        progress.end()
        if is_serving:
            tell("stopping once the running requests have ended; Ctrl-C again stops at once")
            await _ends_before(hurrying, asyncio.create_task(cluster.stop()))
        await cluster.kill()
    return 1 if cluster.num_deaths else 0


def tell_output(name: str, line: str) -> None:
    """A line of a process, but for the error that it ends with: the cluster repeats that one."""
    if not line.startswith(ERROR_PREFIX):
        tell(f"[{name}] {line}")


def _on_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Set by the first and by the second SIGINT or SIGTERM."""
    first, second = asyncio.Event(), asyncio.Event()

    def take() -> None:
        if first.is_set():
            second.set()
        first.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, take)
    return first, second


async def _ends_before(event: asyncio.Event, task: asyncio.Task[Any]) -> bool:
    """Whether the task ended, well or not, before the event; if not, it was cancelled."""
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
        return task.done()
    finally:
        waiting.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


class _Progress:
    """How the start comes along: a spinner on a terminal, else a line each."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._status = console.status("starting") if console.is_terminal else None
        if self._status is not None:
            self._status.start()

    def __call__(self, text: str) -> None:
        if self._status is not None:
            self._status.update(text)
        else:
            tell(text)

    def end(self) -> None:
        """What comes later is told line by line. Idempotent."""
        if self._status is not None:
            self._status.stop()
            self._status = None


def _description(cluster: Cluster) -> dict[str, Any]:
    workers = [asdict(worker) for worker in cluster.workers]
    return {"pid": os.getpid(), **asdict(cluster.endpoints), "workers": workers}


def _show(cluster: Cluster) -> None:
    at = cluster.endpoints
    rows = [
        (worker.role, worker.id, worker.address, worker.blocks_total, worker.pid)
        for worker in sorted(cluster.workers, key=lambda one: (one.role != "prefill", one.id))
    ]
    show_table(("role", "id", "address", "blocks", "pid"), rows)
    router = "" if at.grpc == DEFAULT_ROUTER else f" --router {at.grpc}"
    admin = "" if at.admin == DEFAULT_ADMIN else f" --admin {at.admin}"
    model = cluster.workers[0].model
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    show_line(
        f"""
OpenAI API  {at.http}/v1
gRPC        {at.grpc}
admin       {at.admin}

  baton complete{router} "Once upon a time"
  baton chat{router}
  baton admin workers list{admin}
  curl {at.http}/v1/chat/completions -H "Content-Type: application/json" -d '{body}'

Ctrl-C stops the cluster."""
    )
