"""Whole clusters on virtual time, one per seed: whatever happens to them, they keep their promise.

pytest tests/sim --sim-seeds 5000          a long run
pytest tests/sim --sim-seed 17             that one again, exactly
"""

import logging
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest
from sim.clients import write_model
from sim.fabric import ReadFault
from sim.faults import Fault
from sim.points import POINTS
from sim.run import Outcome, prepare_process, simulate
from sim.seeds import DEFAULT_SEEDS, chosen_seeds

from baton.common import metric_names as names

SEED_DEADLINE_S = 110.0
MAX_PROCESSES = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "oracle")


class Seeds:
    """All seeds of this session, two at a time in processes of their own."""

    def __init__(self, pool: ProcessPoolExecutor, model: Path, seeds: list[int]) -> None:
        self._outcomes: dict[int, Future[Outcome]] = {
            seed: pool.submit(simulate, seed, model) for seed in seeds
        }

    def __getitem__(self, seed: int) -> Outcome:
        return self._outcomes[seed].result(SEED_DEADLINE_S)

    def __iter__(self) -> Iterator[Outcome]:
        return (self[seed] for seed in self._outcomes)


@pytest.fixture(scope="module")
def seeds(model: Path, request: pytest.FixtureRequest) -> Iterator[Seeds]:
    collected = [getattr(item, "callspec", None) for item in request.session.items]
    chosen = {spec.params["seed"] for spec in collected if spec and "seed" in spec.params}
    with ProcessPoolExecutor(
        min(MAX_PROCESSES, os.cpu_count() or 1),
        # Children of their own hash seeds, so that nothing depends on the order of a set.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=prepare_process,
    ) as pool:
        yield Seeds(pool, model, sorted(chosen))
        pool.shutdown(cancel_futures=True)


def test_a_cluster_keeps_its_promise(seed: int, seeds: Seeds) -> None:
    outcome = seeds[seed]
    assert not outcome.failure, f"{outcome.failure}\nreplay with --sim-seed {seed}"


def test_the_same_seed_gives_the_same_history(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.CRITICAL + 1):
        first, again, other = (simulate(seed, model) for seed in (3, 3, 4))
    assert (first.digest, first.counters) == (again.digest, again.counters)
    assert first.digest != other.digest


def test_another_process_gives_the_same_history(
    model: Path, seeds: Seeds, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    """A seed that failed somewhere can be looked at anywhere."""
    seed = chosen_seeds(request.config)[-1]
    with caplog.at_level(logging.CRITICAL + 1):
        here = simulate(seed, model)
    there = seeds[seed]
    assert here.digest == there.digest


# What 500 seeds must at least have seen of everything; the figures are about half of what they do.
MIN_OF_EACH_FAULT = 40
MIN_OF_EACH_READ_FAULT = 5
MIN_SHARE_OF_POINTS = 0.8
MIN_COUNTS = {
    names.RECOVERIES: 500,
    names.MOVES: 40,
    names.MOVES_FAILED: 15,
    names.MOVED_IN: 20,
    "preemptions": 150,
    names.FENCE_FAILURES: 30,
    names.LEASES_EXPIRED: 20,
    names.LEASES_LINK_LOST: 3,
    names.LEASES_REAPED: 30,
    names.LEASES_CANCELLED: 300,
    names.DIGEST_MISMATCHES: 4,
    names.AGENTS_DESTROYED: 15,
    names.PULLS_LATE: 15,
    names.RECORDS_LATE: 100,
}


def test_everything_happened_often_enough(seeds: Seeds, request: pytest.FixtureRequest) -> None:
    """Seeds that see no fault prove nothing."""
    if len(chosen_seeds(request.config)) < DEFAULT_SEEDS:
        pytest.skip("a part of the seeds need not see everything")
    faults: Counter[str] = Counter()
    counters: Counter[str] = Counter()
    for outcome in seeds:
        faults.update(outcome.faults)
        counters.update(outcome.counters)
    rare = {fault.name: faults[fault.name] for fault in Fault}
    assert {name: n for name, n in rare.items() if n < MIN_OF_EACH_FAULT} == {}
    rare = {fault.name: faults[fault.name] for fault in ReadFault}
    assert {name: n for name, n in rare.items() if n < MIN_OF_EACH_READ_FAULT} == {}
    reached = [name for name in POINTS if faults[f"crash at {name}"] + faults[f"freeze at {name}"]]
    assert len(reached) >= MIN_SHARE_OF_POINTS * len(POINTS), reached
    short = {name: counters[name] for name, least in MIN_COUNTS.items() if counters[name] < least}
    assert short == {}
