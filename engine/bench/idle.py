"""How long the GPU does nothing between decode steps, as a profiler sees it."""

from collections.abc import Iterator

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from baton.engine.bench.decode import run_steps
from baton.engine.bench.sequences import decoding_sequence, let_go
from baton.engine.bench.subject import Subject
from baton.kernels.bench.figures import Figure

ROWS, CONTEXT, STEPS, WARM_UP_STEPS = 64, 1024, 20, 10
TARGET = 0.03


def measure(subject: Subject) -> Iterator[Figure]:
    if subject.max_num_seqs < ROWS:
        return
    subject.say(f"idle between steps of {ROWS} x {CONTEXT}")
    engine = subject.engine
    sequences = [decoding_sequence(engine, CONTEXT, STEPS + WARM_UP_STEPS + 5) for _ in range(ROWS)]
    try:
        run_steps(subject, sequences, WARM_UP_STEPS)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run_steps(subject, sequences, STEPS)
            torch.cuda.synchronize()
    finally:
        let_go(engine, sequences)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    )
    # The profiler's own start and end are no steps.
    yield Figure(
        name="idle",
        what=f"share of the time between first and last kernel of {STEPS} steps in which none ran",
        achieved=max(idle_share(spans), 1e-4),
        unit="of the time",
        limit=TARGET,
        limit_name="at most",
        target=1.0,
        less_is_better=True,
        details={"kernels": len(spans)},
    )


def idle_share(spans: list[tuple[float, float]]) -> float:
    """Of sorted spans, which may overlap: what of the time from first to last lies in none."""
    if not spans:
        return 1.0
    idle, reached = 0.0, spans[0][1]
    for start, end in spans[1:]:
        idle += max(0.0, start - reached)
        reached = max(reached, end)
    return idle / (reached - spans[0][0])
