"""The time of prompts, as the share of a plain matrix product's rate that the operations reach."""

import statistics
from collections.abc import Iterator

import torch

from baton.engine.bench.geometry import prefill_operations
from baton.engine.bench.sequences import let_go, new_sequence, reserve
from baton.engine.bench.subject import Subject
from baton.engine.engine import STEP_DEADLINE_S
from baton.engine.sequence import Chunk, Sequence
from baton.kernels.bench.figures import Figure

# Prompts, tokens of each, the share to reach, and vLLM's.
CASES = ((1, 128, None, None), (1, 1024, None, None), (8, 1024, 0.92, 0.91), (1, 8192, 0.94, 0.92))
REPEATS = 7


def measure(subject: Subject) -> Iterator[Figure]:
    config = subject.engine.model_config
    for prompts, length, target, vllm in CASES:
        subject.say(f"prefill {prompts} x {length}")
        seconds = [prefill_seconds(subject, prompts, length) for _ in range(REPEATS)]
        took = statistics.median(seconds[1:])
        operations = prefill_operations(config, prompts, length)
        yield Figure(
            name=f"prefill {prompts} x {length}",
            what=f"{prompts} prompts of {length} tokens to their first tokens",
            achieved=operations / took / 1e12,
            unit="TFLOP/s",
            limit=subject.matmul_rate / 1e12,
            limit_name="8192³ matmul",
            target=target,
            rival=None if vllm is None else vllm * subject.matmul_rate / 1e12,
            rival_name="" if vllm is None else f"vLLM's share of {vllm:.2f}",
            details={"ms": 1e3 * took, "tokens_per_s": prompts * length / took},
        )


def prefill_seconds(subject: Subject, prompts: int, length: int) -> float:
    """Seconds on the device, from the first kernel to the first tokens."""
    engine, stream = subject.engine, subject.stream
    sequences = [new_sequence(engine, length, 2) for _ in range(prompts)]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    try:
        for sequence in sequences:
            reserve(engine, sequence, length + 1)
        begin.record(stream)
        while any(sequence.num_promised == 0 for sequence in sequences):
            if not engine.can_launch:
                _collect(subject)
            engine.launch(_chunks(sequences, subject.max_num_batched_tokens))
        end.record(stream)
        while engine.in_flight:
            _collect(subject)
        end.synchronize()
    finally:
        let_go(engine, sequences)
    return float(begin.elapsed_time(end)) / 1e3


def _chunks(sequences: list[Sequence], budget: int) -> list[Chunk]:
    chunks = []
    for sequence in sequences:
        count = min(budget, 0 if sequence.num_promised else sequence.num_pending)
        if count:
            chunks.append(Chunk(sequence, count))
            budget -= count
    return chunks


def _collect(subject: Subject) -> None:
    subject.engine.wait(STEP_DEADLINE_S)
    subject.engine.collect()
