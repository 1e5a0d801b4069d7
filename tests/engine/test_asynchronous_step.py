"""Launch and collect: nothing moves before the event, and what is in flight has an owner."""

from random import Random

import pytest
from support.oracle_model import EOS_ID, write_oracle_model

from baton.common.errors import InternalError
from baton.common.randomness import SeededRandomness
from baton.common.sampling import SamplingParams
from baton.engine.device import InlineDevice, ManualDevice, ThreadDevice
from baton.engine.engine import Engine
from baton.engine.engine_config import EngineConfig
from baton.engine.finish import finish_reason
from baton.engine.oracle import oracle_answer
from baton.engine.sequence import Chunk, Sequence

BLOCK = 4
NUM_BLOCKS = 12
GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
PROMPT = [7, 300, 5, 9, 8, 2, 400, 11, 12, 13]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_oracle_model(tmp_path_factory.mktemp("oracle"), tokenizer=False)


def make_engine(folder, device, **options) -> Engine:
    config = EngineConfig(
        **{
            "model": folder,
            "block_size": BLOCK,
            "num_blocks": NUM_BLOCKS,
            "check_invariants": True,
            **options,
        }
    )
    return Engine(config, SeededRandomness(3), device=device)


@pytest.fixture
def device():
    return ManualDevice()


@pytest.fixture
def engine(folder, device):
    made = make_engine(folder, device)
    yield made
    made.close()


def admit(engine: Engine, prompt=PROMPT, sampling=GREEDY, output=()) -> Sequence:
    sequence = engine.new_sequence(list(prompt), sampling, b"tenant", output)
    assert engine.kv.reserve(sequence, len(sequence.tokens), len(sequence.tokens) - 1)
    return sequence


def test_nothing_moves_before_collect(engine, device):
    sequence = admit(engine)
    engine.launch([Chunk(sequence, len(PROMPT))])
    assert engine.in_flight
    assert engine.collect() is None
    assert (sequence.num_computed, sequence.num_forwarded, len(sequence.tokens)) == (0, 0, 10)
    assert not engine.arena.tensor.any(), "the KV is written by the device"
    engine.kv.publish(sequence, len(PROMPT))
    assert len(engine.prefix) == 0, "a block is published only after its event was seen"
    engine.check(sequences=[sequence])

    device.run_all()
    assert (sequence.num_computed, len(sequence.tokens)) == (0, 10)
    outcome = engine.collect()
    assert outcome == [(sequence, oracle_answer(PROMPT, 1, 512)[0])]
    assert not engine.in_flight
    assert (sequence.num_computed, sequence.num_forwarded, len(sequence.tokens)) == (10, 10, 11)
    engine.kv.publish(sequence, len(PROMPT))
    assert len(engine.prefix) == 2
    engine.check(sequences=[sequence])


def test_outcomes_come_in_chunk_order_with_none_for_chunks_that_are_not_last(engine, device):
    first, second, third = admit(engine), admit(engine, PROMPT[::-1]), admit(engine, [4, 5])
    engine.launch([Chunk(first, 3), Chunk(third, 2), Chunk(second, 10)])
    device.run_all()
    [(a, none), (b, of_third), (c, of_second)] = engine.collect()
    assert (a, b, c) == (first, third, second)
    assert none is None
    assert of_third == oracle_answer([4, 5], 1, 512)[0]
    assert of_second == oracle_answer(PROMPT[::-1], 1, 512)[0]
    assert first.num_computed == 3


def test_collect_without_a_step_is_empty_and_three_steps_are_a_bug(engine, device):
    assert engine.collect() == []
    sequence = admit(engine)
    engine.launch([Chunk(sequence, 4)])
    engine.launch([Chunk(sequence, 4)])
    assert not engine.can_launch
    with pytest.raises(AssertionError, match="2 steps are in flight at most"):
        engine.launch([Chunk(sequence, 2)])


def test_retiring_lists_the_blocks_that_the_step_may_write(engine, device):
    sequence = admit(engine)
    assert engine.retiring == []
    engine.launch([Chunk(sequence, 3)])
    assert engine.retiring == [tuple(sequence.slots[:1])]
    device.run_all()
    engine.collect()
    assert engine.retiring == []
    engine.launch([Chunk(sequence, 6)])
    assert engine.retiring == [tuple(sequence.slots[:3])], "tokens [3, 9) lie in three blocks"
    assert [engine.pool.refcount(slot) for slot in sequence.slots] == [2, 2, 2]
    device.run_all()
    engine.collect()
    assert [engine.pool.refcount(slot) for slot in sequence.slots] == [1, 1, 1]


def test_slots_released_in_flight_are_given_to_nobody_before_collect(engine, device):
    """Without the pin the late write would land in the blocks of the next sequence."""
    cancelled, kept = admit(engine), admit(engine, [1, 2, 3])
    slots = list(cancelled.slots)
    words = [engine.generations.word(slot) for slot in slots]
    engine.launch([Chunk(cancelled, 10), Chunk(kept, 3)])
    engine.kv.release(cancelled)
    engine.check(sequences=[kept])

    free = engine.kv.available
    assert free == NUM_BLOCKS - 4, "what the step may write is not available"
    other = engine.new_sequence(list(range(20, 20 + free * BLOCK)), GREEDY, b"tenant")
    assert not engine.kv.reserve(other, (free + 1) * BLOCK, 0)
    assert engine.kv.reserve(other, free * BLOCK, 0)
    assert not set(other.slots) & set(slots)
    assert [engine.generations.word(slot) for slot in slots] == words
    # As a transport does it: at once, beside whatever the device still has to do.
    engine.arena.tensor[other.slots] = 1.0

    device.run_all()
    assert (engine.arena.tensor[other.slots] == 1.0).all()
    [(only, _)] = engine.collect()
    assert only is kept
    assert (cancelled.num_computed, cancelled.num_forwarded, cancelled.slots) == (0, 0, [])
    assert cancelled.tokens == PROMPT
    assert engine.kv.available == 3
    engine.check(sequences=[kept, other])


def test_a_sequence_reserved_again_in_flight_is_not_moved_by_the_old_step(engine, device):
    sequence = admit(engine)
    engine.launch([Chunk(sequence, 10)])
    engine.kv.release(sequence)
    assert engine.kv.reserve(sequence, 10, 9)
    device.run_all()
    assert engine.collect() == []
    assert (sequence.num_computed, sequence.tokens) == (0, PROMPT)
    engine.launch([Chunk(sequence, 10)])
    device.run_all()
    assert engine.collect() == [(sequence, oracle_answer(PROMPT, 1, 512)[0])]


@pytest.mark.parametrize("seed", range(3))
def test_cancels_in_flight_on_a_late_device_spoil_no_answer(folder, seed):
    """Whoever ends has the right tokens, whatever was cancelled and admitted during the flights."""
    random = Random(seed)
    late = ThreadDevice(SeededRandomness(seed), 0.0003)
    engine = make_engine(folder, late, num_blocks=24, kv_digest=True)
    running, num_right = [], 0

    def admit_one() -> bool:
        prompt = [random.randrange(2, 6) for _ in range(random.randrange(1, 20))]
        sequence = engine.new_sequence(prompt, GREEDY, b"tenant")
        if engine.kv.reserve(sequence, len(prompt) + 8, len(prompt) - 1):
            running.append(sequence)
        return bool(sequence.slots)

    for _ in range(200):
        while len(running) < 6 and admit_one():
            pass
        engine.launch([Chunk(s, min(s.num_pending, random.randrange(1, 9))) for s in running])
        while running and random.random() < 0.4:
            engine.kv.release(running.pop(random.randrange(len(running))))
            admit_one()
        engine.check(sequences=running)
        engine.wait(20.0)
        for sequence, _ in engine.collect():
            engine.kv.publish(sequence, sequence.num_computed)
            if sequence.num_output == 8:
                prompt = sequence.tokens[: sequence.prompt_len]
                assert sequence.tokens[len(prompt) :] == oracle_answer(prompt, 8, 512)
                num_right += 1
                running.remove(sequence)
                engine.kv.release(sequence)
        engine.check(sequences=running)
    assert num_right > 10
    assert engine.kv.num_digest_mismatches == 0
    engine.close()


def test_tables_may_grow_in_flight(engine, device):
    sequence = admit(engine)
    engine.launch([Chunk(sequence, 10)])
    assert engine.kv.grow(sequence, 20)
    device.run_all()
    [(only, token)] = engine.collect()
    assert (only, token is None) == (sequence, False)
    assert len(engine.retiring) == 0
    engine.check(sequences=[sequence])


def test_what_a_step_raises_comes_out_of_collect_and_leaves_no_pins(engine, device):
    sequence = admit(engine)
    engine.launch([Chunk(sequence, 10)])
    sequence.tokens.append(-1)
    device.run_all()
    with pytest.raises(AssertionError, match="were changed"):
        engine.collect()
    assert not engine.in_flight
    engine.check(sequences=[sequence])


def test_a_step_by_hand_cannot_be_waited_for(engine):
    with pytest.raises(InternalError):
        engine.step([Chunk(admit(engine), 10)])


def test_step_returns_the_sampled_alone(folder):
    engine = make_engine(folder, InlineDevice())
    first, second = admit(engine), admit(engine, [4, 5])
    sampled = engine.step([Chunk(first, 3), Chunk(second, 2)])
    assert sampled == [(second, oracle_answer([4, 5], 1, 512)[0])]
    assert engine.runner.tokens_forwarded == 5


def run(engine: Engine, sequence: Sequence) -> list[int]:
    """Step until the sequence ends; its output."""
    reason = None
    while reason is None:
        assert engine.kv.grow(sequence, len(sequence.tokens))
        engine.step([Chunk(sequence, sequence.num_pending)])
        reason = finish_reason(sequence, (EOS_ID,), engine.model_config.max_model_len)
    engine.kv.release(sequence)
    return sequence.tokens[sequence.prompt_len :]


SAMPLINGS = {
    "greedy": {"temperature": 0.0, "ignore_eos": True},
    "seeded": {"temperature": 1.3, "seed": 77, "ignore_eos": True},
    "filtered": {"temperature": 0.9, "seed": 5, "top_k": 40, "top_p": 0.9, "ignore_eos": True},
    "repetition": {"temperature": 0.0, "repetition_penalty": 1.4, "ignore_eos": True},
    "presence": {"temperature": 1.0, "seed": 3, "presence_penalty": 1.5, "ignore_eos": True},
    "frequency": {"temperature": 0.3, "seed": 4, "frequency_penalty": 0.7, "ignore_eos": True},
    # Biased so far towards EOS that only min_tokens keeps it out.
    "min_tokens": {"temperature": 0.0, "min_tokens": 23, "logit_bias": ((EOS_ID, 50.0),)},
    "stop": {"temperature": 0.0, "stop_token_ids": tuple(range(64, 192)), "min_tokens": 17},
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_resumed_run_equals_an_uninterrupted_one(folder, name):
    engine = make_engine(folder, InlineDevice(), num_blocks=32)
    sampling = SamplingParams(max_tokens=40, **SAMPLINGS[name])
    whole = run(engine, admit(engine, sampling=sampling))
    if name == "min_tokens":
        assert (len(whole), whole[-1]) == (24, EOS_ID)
    elif name == "stop":
        assert 17 < len(whole) < 40
    else:
        assert len(whole) == 40
    for emitted in (1, 2, 7, 16, len(whole) - 1):
        resumed = admit(engine, sampling=sampling, output=whole[:emitted])
        assert (resumed.prompt_len, resumed.num_output) == (len(PROMPT), emitted)
        assert run(engine, resumed) == whole


def test_the_resumed_samplings_differ_when_the_boundary_moves(folder):
    """That the test above can fail: emitted tokens counted as prompt give other answers."""
    engine = make_engine(folder, InlineDevice(), num_blocks=32)
    for name in ("seeded", "presence", "frequency", "min_tokens"):
        sampling = SamplingParams(max_tokens=40, **SAMPLINGS[name])
        whole = run(engine, admit(engine, sampling=sampling))
        moved = run(engine, admit(engine, [*PROMPT, *whole[:7]], sampling))
        assert [*whole[:7], *moved][: len(whole)] != whole, name
