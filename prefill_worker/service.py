"""The prefill worker's wiring: its scheduler and core inside a WorkerServer."""

from pathlib import Path

from baton.common.config import WorkerConfig
from baton.common.progress import Progress, no_progress
from baton.common.sampling import Role
from baton.kvtransfer.transport.open import open_transport
from baton.prefill_worker.core import PrefillCore
from baton.prefill_worker.scheduler import PrefillScheduler
from baton.worker.server import Rank, TransportFactory, WorkerServer


def build_core(rank: Rank) -> PrefillCore:
    """The role's state machine on this rank."""
    scheduler = PrefillScheduler(
        max_num_batched_tokens=rank.config.max_num_batched_tokens,
        max_num_seqs=rank.config.max_num_seqs,
    )
    return PrefillCore(
        rank.engine,
        scheduler,
        rank.limits,
        identity=rank.identity,
        clock=rank.clock,
        timing=rank.timing,
    )


def prefill_server(
    config: WorkerConfig,
    model_folder: Path,
    *,
    transport_factory: TransportFactory = open_transport,
    progress: Progress = no_progress,
) -> WorkerServer:
    """A prefill worker, not started yet."""
    return WorkerServer(
        config,
        Role.PREFILL,
        build_core,
        model_folder=model_folder,
        open_transport=transport_factory,
        progress=progress,
    )
