"""Many requests at once on one engine that prefills and decodes in the same steps."""

from collections.abc import Iterator

from baton.common.clock import SystemClock
from baton.engine.bench.sequences import new_sequence
from baton.engine.bench.subject import Subject
from baton.engine.generation import Generation
from baton.kernels.bench.figures import Figure

REQUESTS, PROMPT, OUTPUT = 1000, 1024, 128
WARM_UP_REQUESTS = 20
TARGET, VLLM = 4250.0, 4058.0


def measure(subject: Subject) -> Iterator[Figure]:
    subject.say(f"offline {REQUESTS} x {PROMPT} + {OUTPUT}")
    run(subject, WARM_UP_REQUESTS)
    seconds = run(subject, REQUESTS)
    yield Figure(
        name="offline",
        what=f"{REQUESTS} requests of {PROMPT} tokens in and {OUTPUT} out, all there at once",
        achieved=REQUESTS * OUTPUT / seconds,
        unit="output tokens/s",
        limit=TARGET,
        limit_name="to reach",
        target=1.0,
        rival=VLLM,
        rival_name="vLLM 0.24",
        details={"seconds": seconds, "tokens_per_s": REQUESTS * (PROMPT + OUTPUT) / seconds},
    )


def run(subject: Subject, count: int) -> float:
    """Seconds from the first step to the last token."""
    engine, clock = subject.engine, SystemClock()
    sequences = [new_sequence(engine, PROMPT, OUTPUT) for _ in range(count)]
    generation = Generation(
        engine, sequences, subject.max_num_batched_tokens, subject.max_num_seqs, None
    )
    began = clock.monotonic()
    generation.run()
    took = clock.monotonic() - began
    engine.kv.drop_all_cached()
    return took
