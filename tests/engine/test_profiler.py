"""A profile of some steps on a CPU: which steps, what the trace holds, one at a time."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.common.errors import AlreadyExists, InvalidRequest
from baton.common.randomness import SeededRandomness
from baton.common.sampling import SamplingParams
from baton.engine.engine import Engine
from baton.engine.engine_config import EngineConfig
from baton.engine.profiler import Recording, StepProfiler
from baton.engine.sequence import Chunk, Sequence


@pytest.fixture
def engine(tiny_llama: Path) -> Iterator[Engine]:
    config = EngineConfig(model=tiny_llama, num_blocks=8, num_threads=1)
    made = Engine(config, SeededRandomness(1))
    yield made
    made.close()


@pytest.fixture
def ended() -> list[Recording]:
    return []


@pytest.fixture
def profiler(engine: Engine, ended: list[Recording]) -> Iterator[StepProfiler]:
    made = StepProfiler(engine.recorder, ended.append, on_gpu=False)
    yield made
    made.close()


def admit(engine: Engine) -> Sequence:
    greedy = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
    sequence = engine.new_sequence([5, 6, 7], greedy, b"")
    assert engine.kv.reserve(sequence, 128, 2)
    return sequence


def run(engine: Engine, sequence: Sequence, profiler: StepProfiler) -> None:
    engine.step([Chunk(sequence, sequence.num_pending)])
    profiler.look()


def test_a_profile_has_its_steps_and_ends_by_itself_in_a_trace_that_names_operators(
    engine: Engine, profiler: StepProfiler, ended: list[Recording], tmp_path: Path
) -> None:
    sequence, path = admit(engine), tmp_path / "trace.json"
    run(engine, sequence, profiler)
    profiler.start(2, path)
    run(engine, sequence, profiler)
    assert ended == []
    run(engine, sequence, profiler)
    [recording] = ended
    assert (recording.path, recording.num_steps) == (path, 2)
    assert not path.exists(), "it is written by whoever was told"
    recording.write()
    assert sorted(tmp_path.iterdir()) == [path]
    events = json.loads(path.read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"aten::mm", "aten::linear"} & names, "operators of the model"


def test_a_profile_is_stopped_before_it_has_its_steps(
    engine: Engine, profiler: StepProfiler, ended: list[Recording], tmp_path: Path
) -> None:
    sequence = admit(engine)
    profiler.start(200, tmp_path / "first.json")
    run(engine, sequence, profiler)
    assert profiler.stop() == tmp_path / "first.json"
    # None of the later steps is in it, and another may run.
    profiler.start(1, tmp_path / "second.json")
    run(engine, sequence, profiler)
    assert [(one.path.name, one.num_steps) for one in ended] == [
        ("first.json", 1),
        ("second.json", 1),
    ]


def test_one_profile_at_a_time_and_none_to_stop(profiler: StepProfiler, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"^no profile runs; `baton admin profile start`"):
        profiler.stop()
    path = tmp_path / "trace.json"
    profiler.start(7, path)
    with pytest.raises(AlreadyExists, match=r"already runs, of 7 more steps.*profile stop"):
        profiler.start(1, tmp_path / "other.json")
    profiler.stop()
    with pytest.raises(InvalidRequest, match=f"the last one is {path}"):
        profiler.stop()


def test_the_end_of_the_engine_ends_its_profile(
    profiler: StepProfiler, ended: list[Recording], tmp_path: Path
) -> None:
    profiler.close()
    assert ended == []
    profiler.start(5, tmp_path / "trace.json")
    profiler.close()
    [recording] = ended
    assert recording.num_steps == 0


def test_a_trace_that_cannot_be_written_is_an_error(
    profiler: StepProfiler, ended: list[Recording], tmp_path: Path
) -> None:
    profiler.start(5, tmp_path / "gone" / "trace.json")
    profiler.close()
    with pytest.raises((OSError, RuntimeError)):
        ended[0].write()
