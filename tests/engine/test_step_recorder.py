"""The flight recorder: which steps it keeps, what it says of each, and what of all of them."""

from pathlib import Path

import pytest
from support.oracle_model import write_oracle_model

from baton.common.clock import ManualClock
from baton.common.randomness import SeededRandomness
from baton.common.sampling import SamplingParams
from baton.engine.device import ManualDevice
from baton.engine.engine import Engine
from baton.engine.engine_config import EngineConfig
from baton.engine.sequence import Chunk, Sequence
from baton.engine.step_recorder import Step, StepRecorder, StepSummary, summarise

PROMPT = [7, 300, 5, 9, 8, 2, 400, 11, 12, 13]


def record(recorder: StepRecorder, clock: ManualClock, *took_s: float) -> None:
    for seconds in took_s:
        launch = recorder.launched([])
        clock.advance(seconds)
        recorder.ended(launch, None)


def step(number: int, began_at: float, ended_at: float, *, tokens: int = 0) -> Step:
    return Step(number, began_at, began_at, ended_at, 1, tokens, tokens // 2, None)


def test_the_newest_steps_are_kept_and_come_in_order() -> None:
    clock = ManualClock(50.0)
    recorder = StepRecorder(clock, capacity=4)
    assert recorder.last() == []
    record(recorder, clock, 1.0, 2.0)
    assert [(one.number, one.took_s) for one in recorder.last()] == [(1, 1.0), (2, 2.0)]
    record(recorder, clock, 3.0, 4.0, 5.0, 6.0, 7.0)
    assert [(one.number, one.took_s) for one in recorder.last()] == [
        (4, 4.0),
        (5, 5.0),
        (6, 6.0),
        (7, 7.0),
    ]
    assert [one.number for one in recorder.last(2)] == [6, 7]
    assert [one.number for one in recorder.last(100)] == [4, 5, 6, 7]
    assert recorder.num_launched == recorder.last_ended == 7


def test_percentiles_are_times_of_steps_that_there_were() -> None:
    """Of 1 to 100 ms in any order, and of few."""
    steps, now = [], 0.0
    for number in range(1, 101):
        took_s = (number * 37 % 101) / 1000
        steps.append(step(number, now, now + took_s))
        now += took_s
    found = summarise(steps)
    assert found.steps == 100
    assert (found.p50_s, found.p90_s) == pytest.approx((0.050, 0.090))
    assert (found.p99_s, found.max_s) == pytest.approx((0.099, 0.100))
    few = summarise([step(1, 0.0, 3.0), step(2, 3.0, 4.0), step(3, 4.0, 6.0)])
    assert (few.p50_s, few.p90_s, few.max_s) == (2.0, 3.0, 3.0)
    ten = summarise([step(n, 10.0 * n, 11.0 * n) for n in range(1, 11)])
    assert ten.p90_s == 9.0, "the ninth of ten, not the tenth"


def test_tokens_per_second_are_over_the_window_with_its_pauses() -> None:
    found = summarise([step(1, 10.0, 12.0, tokens=100), step(2, 13.0, 14.0, tokens=20)])
    assert (found.window_s, found.busy_s) == (4.0, 3.0)
    assert (found.tokens, found.prompt_tokens) == (120, 60)
    assert found.tokens_per_s == 30.0
    assert summarise([]) == StepSummary()
    assert summarise([step(1, 5.0, 5.0, tokens=3)]).tokens_per_s == 0.0, "no time, no rate"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(100.0)


@pytest.fixture
def device() -> ManualDevice:
    return ManualDevice()


@pytest.fixture
def engine(tmp_path: Path, device: ManualDevice, clock: ManualClock) -> Engine:
    folder = write_oracle_model(tmp_path / "oracle", tokenizer=False)
    config = EngineConfig(model=folder, block_size=4, num_blocks=24, check_invariants=True)
    return Engine(config, SeededRandomness(3), device=device, clock=clock)


def admit(engine: Engine, prompt: list[int]) -> Sequence:
    greedy = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    sequence = engine.new_sequence(list(prompt), greedy, b"tenant")
    assert engine.kv.reserve(sequence, len(prompt) + 8, len(prompt) - 1)
    return sequence


def test_a_step_is_timed_from_its_launch_or_from_the_end_of_the_one_before(
    engine: Engine, device: ManualDevice, clock: ManualClock
) -> None:
    sequence = admit(engine, PROMPT)
    engine.launch([Chunk(sequence, 10)])
    clock.advance(1.0)
    engine.launch([Chunk(sequence, 1)])
    clock.advance(2.0)
    assert engine.collect() is None
    assert engine.recorder.last() == [], "its end was not seen"
    device.run_next()
    assert engine.collect()
    clock.advance(0.5)
    device.run_next()
    assert engine.collect()
    clock.advance(4.0)
    engine.launch([Chunk(sequence, 1)])
    clock.advance(0.25)
    device.run_next()
    assert engine.collect()
    assert engine.recorder.last() == [
        Step(1, 100.0, 100.0, 103.0, rows=1, tokens=10, prompt_tokens=10, replayed=None),
        Step(2, 101.0, 103.0, 103.5, rows=1, tokens=1, prompt_tokens=0, replayed=None),
        Step(3, 107.5, 107.5, 107.75, rows=1, tokens=1, prompt_tokens=0, replayed=None),
    ]


def test_prompt_tokens_are_those_before_the_first_output(
    engine: Engine, device: ManualDevice, clock: ManualClock
) -> None:
    """Also the last one of a prompt in a chunk of its own, which looks like an output token."""
    prompted, decoding = admit(engine, PROMPT), admit(engine, [4, 5])
    for chunks in (
        [Chunk(decoding, 2), Chunk(prompted, 4)],
        [Chunk(decoding, 1), Chunk(prompted, 5)],
        [Chunk(decoding, 1), Chunk(prompted, 1)],
        [Chunk(decoding, 1), Chunk(prompted, 1)],
    ):
        engine.launch(chunks)
        device.run_all()
        engine.collect()
    counts = [(one.rows, one.tokens, one.prompt_tokens) for one in engine.recorder.last()]
    assert counts == [(2, 6, 6), (2, 6, 5), (2, 2, 1), (2, 2, 0)]


def test_steps_that_were_abandoned_leave_a_gap_in_the_numbers(
    engine: Engine, device: ManualDevice, clock: ManualClock
) -> None:
    sequence = admit(engine, PROMPT)
    engine.launch([Chunk(sequence, 10)])
    device.run_all()
    engine.abandon()
    clock.advance(3.0)
    engine.launch([Chunk(sequence, 10)])
    device.run_all()
    engine.collect()
    [only] = engine.recorder.last()
    assert (only.number, only.began_at, only.took_s) == (2, 103.0, 0.0)
