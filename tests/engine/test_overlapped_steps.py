"""A step that is launched behind one that runs: its tokens are promises, and come out right."""

from random import Random

import pytest
from support.oracle_model import EOS_ID, write_oracle_model

from baton.common.randomness import SeededRandomness
from baton.common.sampling import SamplingParams
from baton.engine.device import InlineDevice, ManualDevice, ThreadDevice
from baton.engine.engine import Engine
from baton.engine.engine_config import EngineConfig
from baton.engine.finish import finish_reason
from baton.engine.llm import LLM
from baton.engine.oracle import oracle_answer, oracle_sampled_answer
from baton.engine.sequence import Chunk, Sequence

BLOCK = 4
VOCAB = 512
GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
PROMPT = [7, 300, 5, 9, 8, 2, 400, 11, 12, 13]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_oracle_model(tmp_path_factory.mktemp("oracle"), tokenizer=False)


def make_engine(folder, device, num_blocks=16) -> Engine:
    config = EngineConfig(
        model=folder, block_size=BLOCK, num_blocks=num_blocks, check_invariants=True
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


def admit(engine: Engine, prompt=PROMPT, sampling=GREEDY) -> Sequence:
    sequence = engine.new_sequence(list(prompt), sampling, b"tenant")
    assert engine.kv.reserve(sequence, len(prompt) + 8, len(prompt) - 1)
    return sequence


def launch_all(engine: Engine, *sequences: Sequence) -> None:
    engine.launch([Chunk(sequence, sequence.num_pending) for sequence in sequences])


def test_a_promised_token_is_fed_without_being_known(engine, device):
    sequence = admit(engine)
    launch_all(engine, sequence)
    assert (sequence.num_pending, sequence.num_promised, sequence.num_launched) == (1, 1, 10)
    launch_all(engine, sequence)
    assert sequence.tokens == PROMPT, "nothing is known before the first step has ended"
    device.run_all()
    expected = oracle_answer(PROMPT, 2, VOCAB)
    assert engine.collect() == [(sequence, expected[0])]
    assert (sequence.num_computed, sequence.num_pending, sequence.num_in_flight) == (10, 1, 1)
    assert engine.collect() == [(sequence, expected[1])]
    assert (sequence.num_computed, sequence.num_pending, sequence.num_in_flight) == (11, 1, 0)
    assert engine.collect() == []


def test_a_promise_names_its_place_among_all_that_the_step_samples(engine, device):
    """Rows come and go between the two steps, and chunks that sample nothing stand between."""
    first, second, third = admit(engine), admit(engine, [4, 5]), admit(engine, [9, 9, 9])
    engine.launch([Chunk(first, 4), Chunk(second, 2), Chunk(third, 3)])
    engine.launch([Chunk(third, 1), Chunk(first, 6), Chunk(second, 1)])
    device.run_all()
    engine.collect()
    sampled = dict(engine.collect())
    assert sampled[third] == oracle_answer([9, 9, 9], 2, VOCAB)[1]
    assert sampled[second] == oracle_answer([4, 5], 2, VOCAB)[1]
    assert sampled[first] == oracle_answer(PROMPT, 1, VOCAB)[0]


def test_chunks_of_a_prompt_follow_each_other_without_a_pause(engine, device):
    sequence = admit(engine)
    engine.launch([Chunk(sequence, 4)])
    engine.launch([Chunk(sequence, 6)])
    assert engine.retiring == [tuple(sequence.slots[:1]), tuple(sequence.slots[1:3])]
    device.run_next()
    assert engine.collect() == [(sequence, None)]
    assert sequence.num_computed == 4
    assert engine.collect() is None
    device.run_all()
    assert engine.collect() == [(sequence, oracle_answer(PROMPT, 1, VOCAB)[0])]


def test_draws_count_the_promised_tokens(folder):
    """Noise is that of the position, which the host knows before the token."""
    sampling = SamplingParams(max_tokens=12, temperature=1.3, top_p=0.9, seed=11, ignore_eos=True)
    engine = make_engine(folder, ThreadDevice(SeededRandomness(1), 0.0))
    sequence = admit(engine, sampling=sampling)
    assert engine.kv.grow(sequence, len(PROMPT) + 12)
    launch_all(engine, sequence)
    for _ in range(11):
        launch_all(engine, sequence)
        engine.wait(20.0)
        assert engine.collect() is not None
    engine.wait(20.0)
    engine.collect()
    assert sequence.tokens[len(PROMPT) :] == oracle_sampled_answer(PROMPT, sampling, VOCAB)
    engine.close()


@pytest.mark.parametrize(
    ("sampling", "why"),
    [
        (SamplingParams(max_tokens=1, temperature=0.0), "its only token is promised"),
        (SamplingParams(max_tokens=9, repetition_penalty=1.2), "penalties look at each token"),
        (SamplingParams(max_tokens=9, presence_penalty=0.5), "penalties look at each token"),
    ],
)
def test_what_cannot_continue_behind_a_promise(engine, device, sampling, why):
    sequence = admit(engine, sampling=sampling)
    assert engine.can_continue(sequence)
    launch_all(engine, sequence)
    assert not engine.can_continue(sequence), why
    device.run_all()
    engine.collect()
    assert engine.can_continue(sequence)


def test_a_row_in_vain_touches_nobody(engine, device):
    """It ended with the token before: what its last row writes belongs to no one until it lands."""
    over, other = admit(engine), admit(engine, [4, 5])
    launch_all(engine, over, other)
    launch_all(engine, over, other)
    device.run_next()
    engine.collect()
    written = over.slots[len(PROMPT) // BLOCK]
    engine.kv.release(over)
    engine.check(sequences=[other])
    assert engine.pool.refcount(written) == 1, "the row in vain holds what it writes"
    device.run_all()
    assert engine.collect() == [(other, oracle_answer([4, 5], 2, VOCAB)[1])]
    assert engine.pool.refcount(written) == 0
    assert over.tokens == [*PROMPT, oracle_answer(PROMPT, 1, VOCAB)[0]]


def test_what_is_abandoned_is_pending_again(engine, device):
    sequence = admit(engine)
    launch_all(engine, sequence)
    launch_all(engine, sequence)
    device.run_all()
    engine.abandon()
    assert not engine.in_flight
    assert sequence.num_pending == len(PROMPT)
    engine.check(sequences=[sequence])
    launch_all(engine, sequence)
    device.run_all()
    assert engine.collect() == [(sequence, oracle_answer(PROMPT, 1, VOCAB)[0])]


def test_a_failed_step_fails_the_one_that_was_promised_its_tokens(engine, device, monkeypatch):
    def fail(_step, _sampled=()):
        raise ArithmeticError("overflow")

    sequence = admit(engine)
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "_execute", fail)
        launch_all(engine, sequence)
    launch_all(engine, sequence)
    device.run_all()
    for _ in range(2):
        with pytest.raises(ArithmeticError):
            engine.collect()
    assert engine.retiring == []


def test_a_device_in_place_overlaps_nothing(folder):
    engine = make_engine(folder, InlineDevice())
    launch_all(engine, admit(engine))
    assert not engine.can_launch


@pytest.mark.parametrize("seed", range(4))
def test_overlapped_steps_spoil_no_answer(folder, seed):
    """Two steps in flight all the time, with ends that nobody foresaw, cancels and newcomers."""
    random = Random(seed)
    engine = make_engine(folder, ThreadDevice(SeededRandomness(seed), 0.0003), num_blocks=40)
    model = engine.model_config
    running, num_right = [], 0

    def admit_one() -> bool:
        prompt = [random.randrange(2, 6) for _ in range(random.randrange(1, 20))]
        sampling = SamplingParams(
            max_tokens=random.randrange(1, 9),
            temperature=0.0,
            ignore_eos=random.random() < 0.5,
            stop_token_ids=(random.randrange(VOCAB),),
        )
        sequence = engine.new_sequence(prompt, sampling, b"tenant")
        if engine.kv.reserve(sequence, len(prompt) + 8, len(prompt) - 1):
            running.append(sequence)
        return bool(sequence.slots)

    for _ in range(300):
        while len(running) < 6 and admit_one():
            pass
        ready = [each for each in running if each.num_pending and engine.can_continue(each)]
        if engine.can_launch and ready:
            chosen = random.sample(ready, random.randrange(1, len(ready) + 1))
            engine.launch([Chunk(s, random.randrange(1, s.num_pending + 1)) for s in chosen])
        if running and random.random() < 0.1:
            engine.kv.release(running.pop(random.randrange(len(running))))
        engine.check(sequences=running)
        if not engine.can_launch or random.random() < 0.3:
            engine.wait(20.0)
        for sequence, token in engine.collect() or []:
            engine.kv.publish(sequence, sequence.num_computed)
            if token is None:
                continue
            if finish_reason(sequence, (EOS_ID,), model.max_model_len) is not None:
                prompt = sequence.tokens[: sequence.prompt_len]
                expected = oracle_sampled_answer(
                    prompt, sequence.sampling, VOCAB, eos_token_ids=(EOS_ID,)
                )
                assert sequence.tokens[len(prompt) :] == expected
                num_right += 1
                running.remove(sequence)
                engine.kv.release(sequence)
        engine.check(sequences=running)
    assert num_right > 20
    engine.abandon()
    engine.close()


def test_llm_gives_the_same_with_and_without_overlap(folder):
    prompts = [[number, *PROMPT] for number in range(2, 9)]
    sampling = SamplingParams(max_tokens=20, temperature=0.8, seed=5)
    answers = []
    for max_in_flight in (1, 2):
        llm = LLM(
            folder, block_size=BLOCK, num_blocks=40, max_num_batched_tokens=16, max_num_seqs=4
        )
        assert llm.engine.max_in_flight == 2
        llm.engine.max_in_flight = max_in_flight
        answers.append(llm.generate(prompts, sampling))
        assert not llm.engine.in_flight
    assert answers[0] == answers[1]
