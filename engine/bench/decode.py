"""The time of a decode step, against what reading weights and KV takes."""

import statistics
from collections.abc import Iterator

import torch

from baton.engine.bench.geometry import kv_bytes, weight_bytes
from baton.engine.bench.sequences import decoding_sequence, let_go
from baton.engine.bench.subject import Subject
from baton.engine.engine import STEP_DEADLINE_S, Engine
from baton.engine.sequence import Chunk, Sequence
from baton.kernels.bench.figures import Figure

# Rows, tokens of each one's context, milliseconds to reach (None: only told), and vLLM's.
CASES = (
    (1, 128, None, 4.84),
    (1, 1024, 4.15, 4.89),
    (8, 1024, None, 5.19),
    (32, 1024, None, 6.32),
    (64, 1024, 6.6, 7.65),
    (128, 1024, None, 10.52),
    (256, 1024, 15.2, 17.65),
    (256, 128, 8.5, 10.68),
    (1, 8192, None, 5.16),
    (16, 4096, None, 7.00),
)
WARM_UP_STEPS = 10
STEPS = 8
WINDOWS = 7


def measure(subject: Subject) -> Iterator[Figure]:
    """Medians over windows of steps, two in flight as ever."""
    config = subject.engine.model_config
    for rows, context_len, target_ms, vllm_ms in CASES:
        if rows > subject.max_num_seqs:
            continue
        subject.say(f"decode {rows} x {context_len}")
        seconds = step_seconds(subject, rows, context_len)
        num_bytes = weight_bytes(config) + kv_bytes(config, rows * context_len)
        floor_ms = 1e3 * num_bytes / subject.copy_rate
        yield Figure(
            name=f"decode {rows} x {context_len}",
            what=f"a step of {rows} rows with contexts of {context_len} tokens",
            achieved=1e3 * seconds,
            unit="ms",
            limit=target_ms,
            limit_name="to reach",
            target=None if target_ms is None else 1.0,
            rival=vllm_ms,
            rival_name="vLLM 0.24",
            less_is_better=True,
            details={"floor_ms": floor_ms, "floor_ratio": floor_ms / (1e3 * seconds)},
        )


def step_seconds(subject: Subject, rows: int, context_len: int) -> float:
    engine = subject.engine
    # Each run leaves one more in flight.
    num_steps = WARM_UP_STEPS + (STEPS + 1) * WINDOWS + 3
    sequences = [decoding_sequence(engine, context_len, num_steps) for _ in range(rows)]
    try:
        run_steps(subject, sequences, WARM_UP_STEPS)
        took = [run_steps(subject, sequences, STEPS) / STEPS for _ in range(WINDOWS)]
    finally:
        let_go(engine, sequences)
    return statistics.median(took)


def run_steps(subject: Subject, sequences: list[Sequence], count: int) -> float:
    """Seconds that `count` steps took on the device. One is left in flight behind them, so that
    the next ones follow without a pause."""
    engine, stream = subject.engine, subject.stream
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    while engine.can_launch:
        _launch(engine, sequences)
    begin.record(stream)
    for _ in range(count):
        _collect(engine)
        _launch(engine, sequences)
    end.record(stream)
    _collect(engine)
    _launch(engine, sequences)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _launch(engine: Engine, sequences: list[Sequence]) -> None:
    engine.launch([Chunk(sequence, 1) for sequence in sequences])


def _collect(engine: Engine) -> None:
    engine.wait(STEP_DEADLINE_S)
    for sequence, _ in engine.collect() or []:
        engine.kv.publish(sequence, sequence.num_computed)
