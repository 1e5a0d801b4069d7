"""The wiring of decode and unified workers: scheduler and core inside a WorkerServer.

A unified worker is the same core under a role of its own. Routers send it whole requests, so that
it dials and serves links only for moves; links to prefill workers are not warmed.
"""

from pathlib import Path

from baton.common.config import WorkerConfig
from baton.common.progress import Progress, no_progress
from baton.common.sampling import Role
from baton.decode_worker.core import DecodeCore
from baton.decode_worker.scheduler import DecodeScheduler
from baton.kvtransfer.transport.open import open_transport
from baton.worker.server import Rank, TransportFactory, WorkerServer


def build_core(rank: Rank) -> DecodeCore:
    """The role's state machine on this rank."""
    scheduler = DecodeScheduler(max_num_seqs=rank.config.max_num_seqs)
    return DecodeCore(
        rank.engine,
        scheduler,
        rank.limits,
        identity=rank.identity,
        transport_name=rank.transport_name,
        max_num_batched_tokens=rank.config.max_num_batched_tokens,
        clock=rank.clock,
        timing=rank.timing,
    )


def decode_server(
    config: WorkerConfig,
    model_folder: Path,
    *,
    transport_factory: TransportFactory = open_transport,
    progress: Progress = no_progress,
) -> WorkerServer:
    """A decode worker, not started yet."""
    return _server(Role.DECODE, config, model_folder, transport_factory, progress)


def unified_server(
    config: WorkerConfig,
    model_folder: Path,
    *,
    transport_factory: TransportFactory = open_transport,
    progress: Progress = no_progress,
) -> WorkerServer:
    """A unified worker, not started yet."""
    return _server(Role.UNIFIED, config, model_folder, transport_factory, progress)


def _server(
    role: Role,
    config: WorkerConfig,
    model_folder: Path,
    transport_factory: TransportFactory,
    progress: Progress,
) -> WorkerServer:
    return WorkerServer(
        config,
        role,
        build_core,
        model_folder=model_folder,
        open_transport=transport_factory,
        progress=progress,
    )
