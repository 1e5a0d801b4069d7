"""A run of the engine's figures: which there are, in which order, on what engine."""

import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from baton.common.clock import SystemClock
from baton.kernels.bench.figures import Figure
from baton.kernels.bench.runner import Report

if TYPE_CHECKING:
    from baton.engine.bench.subject import Subject

# Names of --only to modules; each has `measure(subject)`, an iterator of figures.
GROUPS: Final = {
    "decode": "baton.engine.bench.decode",
    "prefill": "baton.engine.bench.prefill",
    "idle": "baton.engine.bench.idle",
    "offline": "baton.engine.bench.offline",
}
MAX_NUM_SEQS: Final = 256
MAX_NUM_BATCHED_TOKENS: Final = 8192
MAX_MODEL_LEN: Final = 16384
MATMUL: Final = 8192
START_TARGET_S, START_VLLM_S = 30.0, 60.0


def run_groups(report: Report, names: list[str], say: Callable[[str], None]) -> Iterator[Figure]:
    """Load, then measure, group by group. Each figure is in the report as soon as it is known."""
    subject, seconds = _build(say, report.budget_s)
    start = Figure(
        name="start",
        what="an engine from nothing to ready, its random weights drawn and its graphs captured",
        achieved=seconds,
        unit="s",
        limit=START_TARGET_S,
        limit_name="to reach",
        target=1.0,
        rival=START_VLLM_S,
        rival_name="vLLM 0.24",
        less_is_better=True,
        details={"blocks": subject.engine.num_blocks},
    )
    report.figures.append(start)
    yield start
    report.machine["copy_gb_per_s"] = subject.copy_rate / 1e9
    report.machine["matmul_tflops"] = subject.matmul_rate / 1e12
    for name in names:
        measured: Iterator[Figure] = import_module(GROUPS[name]).measure(subject)
        for figure in measured:
            report.figures.append(figure)
            yield figure


def _build(say: Callable[[str], None], budget_s: float) -> tuple["Subject", float]:
    """The subject, and the seconds that its engine took to be ready."""
    import torch

    from baton.common.randomness import SystemRandomness
    from baton.engine.bench.geometry import write_geometry
    from baton.engine.bench.subject import Subject
    from baton.engine.cuda.runner import CudaRunner
    from baton.engine.engine import Engine
    from baton.engine.engine_config import EngineConfig
    from baton.kernels.bench.harness import Context, fill_normal_, normal

    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    context = Context(device=device, budget_s=budget_s, say=say)
    copy_rate = context.copy_rate
    say(f"matmul {MATMUL}³")
    factors = [normal(MATMUL, MATMUL, device=device) for _ in range(3)]
    seconds = context.seconds_per_call(lambda: torch.mm(factors[0], factors[1], out=factors[2]))
    factors.clear()
    context.release()
    with tempfile.TemporaryDirectory() as scratch:
        config = EngineConfig(
            model=write_geometry(Path(scratch) / "model"),
            load_format="dummy",
            device="cuda:0",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        )
        began = SystemClock().monotonic()
        engine = Engine(config, SystemRandomness(), progress=_told(say))
        torch.cuda.synchronize()
        ready_s = SystemClock().monotonic() - began
    # Zeros would spare the tensor cores some power.
    fill_normal_(engine.arena.tensor)
    torch.cuda.synchronize()
    subject = Subject(
        engine=engine,
        stream=cast(CudaRunner, engine.runner).stream,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        copy_rate=copy_rate,
        matmul_rate=2 * MATMUL**3 / seconds,
        say=say,
    )
    return subject, ready_s


def _told(say: Callable[[str], None]) -> Callable[[str, int, int], None]:
    def told(what: str, done: int, total: int) -> None:
        if done in (1, total):
            say(f"{what}: {done} of {total}")

    return told
