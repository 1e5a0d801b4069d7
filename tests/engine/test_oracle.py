"""The oracle model: an engine answers as the pure function does, and every byte counts."""

import numpy as np
import pytest
import torch
from support.oracle_model import EOS_ID, words_per_token, write_oracle_model

from baton.common.errors import ConfigError, ModelError
from baton.common.randomness import SeededRandomness
from baton.common.sampling import SamplingParams
from baton.engine.device import InlineDevice, ThreadDevice
from baton.engine.engine import Engine
from baton.engine.engine_config import EngineConfig
from baton.engine.llm import LLM
from baton.engine.oracle import OracleModel, oracle_answer, oracle_sampled_answer
from baton.engine.sequence import Chunk, Sequence

BLOCK = 8
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_oracle_model(tmp_path_factory.mktemp("oracle"))


def make_engine(folder, runs_steps=None, **options) -> Engine:
    config = EngineConfig(**{"model": folder, "block_size": BLOCK, "num_blocks": 64, **options})
    return Engine(config, SeededRandomness(9), device=runs_steps or InlineDevice())


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 512, (n,), generator=generator).tolist() for n in lengths]


def prefilled(engine: Engine, prompt: list[int]) -> Sequence:
    """A sequence of which all but the last prompt token is computed."""
    sequence = engine.new_sequence(prompt, GREEDY, b"")
    assert engine.kv.reserve(sequence, len(prompt), 0)
    engine.step([Chunk(sequence, len(prompt) - 1)])
    return sequence


def logits_after(engine: Engine, sequence: Sequence) -> torch.Tensor:
    """The logits after the last prompt token, which is written again each time."""
    return engine.runner.prepare([Chunk(sequence, sequence.num_pending)])()[0]


@pytest.mark.parametrize("budget", [2048, 16])
@pytest.mark.parametrize("num_blocks", [64, 9])
def test_batches_and_chunks_equal_the_pure_function(folder, budget, num_blocks):
    asked = prompts(1, 7, 8, 9, 40)
    llm = LLM(
        folder,
        block_size=BLOCK,
        num_blocks=num_blocks,
        max_num_batched_tokens=budget,
        max_num_seqs=4,
        check_invariants=True,
    )
    for prompt, done in zip(asked, llm.generate(asked, GREEDY), strict=True):
        assert done.token_ids == oracle_answer(prompt, 12, 512)
    # The device of an LLM is the oracle's own: a thread that starts late.
    assert llm.engine.max_in_flight == 2
    llm.engine.close()


def test_cache_hits_equal_the_pure_function(folder):
    llm = LLM(folder, block_size=BLOCK, num_blocks=64)
    (shared,) = prompts(30)
    for tail in ([], [3], [3, 4, 5], [6]):
        [done] = llm.generate([[*shared, *tail]], GREEDY)
        assert done.token_ids == oracle_answer([*shared, *tail], 12, 512)
    assert done.cached_tokens == 24
    llm.engine.close()


@pytest.mark.parametrize("shape", [{"num_layers": 3, "num_kv_heads": 2, "head_dim": 16}, {}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_shape_of_blocks_equals_the_pure_function(tmp_path, shape, dtype):
    folder = write_oracle_model(tmp_path, dtype=dtype, tokenizer=False, **shape)
    num_words = words_per_token(itemsize=4 if dtype == "float32" else 2, **shape)
    (prompt,) = prompts(21)
    answers = set()
    for block_size in (1, 5, 8):
        llm = LLM(folder, block_size=block_size, num_blocks=64)
        answers.add(tuple(llm.generate([prompt], GREEDY)[0].token_ids))
        llm.engine.close()
    assert answers == {tuple(oracle_answer(prompt, 12, 512, num_words=num_words))}


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=30, temperature=1.0, seed=5),
        SamplingParams(max_tokens=30, temperature=0.8, seed=6, top_p=0.5, frequency_penalty=0.5),
        SamplingParams(max_tokens=30, temperature=0.0, repetition_penalty=1.2, min_tokens=4),
        SamplingParams(max_tokens=30, temperature=0.0, logit_bias=((EOS_ID, 50.0),), min_tokens=4),
    ],
)
def test_any_sampling_equals_the_pure_function(folder, sampling):
    (prompt,) = prompts(19)
    llm = LLM(folder, block_size=BLOCK, num_blocks=64)
    expected = oracle_sampled_answer(prompt, sampling, 512, eos_token_ids=(EOS_ID,))
    assert llm.generate([prompt], sampling)[0].token_ids == expected
    llm.engine.close()


def test_greedy_forms_agree():
    (prompt,) = prompts(19)
    assert oracle_sampled_answer(prompt, GREEDY, 512) == oracle_answer(prompt, 12, 512)
    stop = oracle_answer(prompt, 12, 512)[5]
    assert oracle_answer(prompt, 12, 512, stop_token_ids=(stop,))[-1] == stop


def test_every_byte_of_the_context_changes_the_logits(folder):
    engine = make_engine(folder)
    (prompt,) = prompts(29)
    sequence = prefilled(engine, prompt)
    right = logits_after(engine, sequence)
    raw = engine.arena.tensor.view(torch.uint8)
    same_token = flips = 0
    # The step writes the last token's bytes itself, so they cannot be wrong before it.
    for position in range(len(prompt) - 1):
        block, offset = divmod(position, BLOCK)
        token_bytes = raw[sequence.slots[block], :, :, :, offset].reshape(-1)
        for place in range(position % 3, len(token_bytes), 3):
            index = (sequence.slots[block], 0, 0, place // 32, offset, place % 32)
            bit = 1 << (place + position) % 8
            raw[index] ^= bit
            wrong = logits_after(engine, sequence)
            raw[index] ^= bit
            assert not torch.isclose(wrong, right, atol=1e-6).all(), (position, place)
            same_token += int(wrong.argmax() == right.argmax())
            flips += 1
    assert torch.equal(logits_after(engine, sequence), right)
    # One token of 512 comes out by chance; that is all that hides from a single greedy token.
    assert flips > 500
    assert same_token < flips / 100


def test_bytes_beyond_the_context_do_not_count(folder):
    engine = make_engine(folder)
    (prompt,) = prompts(29)
    sequence = prefilled(engine, prompt)
    right = logits_after(engine, sequence)
    raw = engine.arena.tensor.view(torch.uint8)
    used = set(sequence.slots)
    for slot in range(engine.num_blocks):
        if slot not in used:
            raw[slot].fill_(255)
    raw[sequence.slots[-1], :, :, :, len(prompt) % BLOCK :].fill_(255)
    assert torch.equal(logits_after(engine, sequence), right)


def test_torn_and_swapped_blocks_change_the_logits(folder):
    engine = make_engine(folder)
    (prompt,) = prompts(32)
    sequence = prefilled(engine, prompt)
    right = logits_after(engine, sequence)
    first, second = sequence.slots[:2]
    tensor = engine.arena.tensor
    kept = tensor[[first, second]].clone()
    tensor[[second, first]] = kept
    assert not torch.equal(logits_after(engine, sequence), right)
    tensor[[first, second]] = kept
    tensor[first, :, :, 1] = tensor[second, :, :, 1]
    assert not torch.equal(logits_after(engine, sequence), right)


def test_kv_depends_on_token_and_position_alone(folder):
    first, second = make_engine(folder), make_engine(folder, num_blocks=16)
    (prompt,) = prompts(16)
    other = [*prompt[:8], (prompt[8] + 1) % 512, *prompt[9:]]
    a, b = prefilled(first, [*prompt, 1]), prefilled(second, [*other, 1])
    of_a = first.arena.tensor[a.slots[:2]].view(torch.int64)
    of_b = second.arena.tensor[b.slots[:2]].view(torch.int64)
    differs = (of_a != of_b).any(dim=-1).nonzero().tolist()
    # Block 1, token 0 of it, K and V.
    assert differs == [[1, 0, 0, 0, 0], [1, 0, 0, 1, 0]]
    words = OracleModel(512, 8).kv_words(list(range(512)) * 2, 0)
    assert len(np.unique(words)) == words.size, "no word comes twice"


def test_logits_are_distinct_finite_fp32():
    digests = [bytes([number] * 8) for number in range(64)]
    for vocab_size in (512, 360, 2048):
        logits = OracleModel(vocab_size, 8).logits(digests)
        assert (logits.dtype, logits.shape) == (np.float32, (64, vocab_size))
        assert np.abs(logits).max() <= 8.0
        assert all(len(np.unique(row)) == vocab_size for row in logits)
        assert len(set(logits.argmax(axis=1).tolist())) > 40


def test_late_devices_change_no_token(folder):
    asked = prompts(40, 23, 9, seed=2)
    device = ThreadDevice(SeededRandomness(4), 0.002)
    engine = make_engine(folder, runs_steps=device)
    sequences = [engine.new_sequence(prompt, GREEDY, b"") for prompt in asked]
    for sequence in sequences:
        assert engine.kv.reserve(sequence, len(sequence.tokens) + 12, 0)
    for _ in range(3 + 12):
        engine.launch([Chunk(each, min(each.num_pending, 16)) for each in sequences])
        polls = 0
        while (outcome := engine.collect()) is None:
            polls += 1
            engine.wait(20.0)
        assert len(outcome) == 3
        if all(len(each.tokens) >= len(p) + 12 for each, p in zip(sequences, asked, strict=True)):
            break
    for prompt, sequence in zip(asked, sequences, strict=True):
        assert sequence.tokens[len(prompt) :][:12] == oracle_answer(prompt, 12, 512)
    engine.close()


def test_the_fingerprint_names_the_model(folder, tmp_path):
    engine, same = make_engine(folder), make_engine(folder, num_blocks=7)
    assert engine.fingerprint_fields["weights"] == "oracle-1"
    assert engine.fingerprint_fields["architecture"] == "BatonOracle"
    assert engine.fingerprint == same.fingerprint
    other = make_engine(write_oracle_model(tmp_path, num_layers=2, tokenizer=False))
    assert other.fingerprint != engine.fingerprint


@pytest.mark.parametrize(
    ("options", "field"),
    [({"head_dim": 2, "dtype": "bfloat16"}, "head_dim"), ({"vocab_size": 4096}, "vocab_size")],
)
def test_shapes_that_the_oracle_cannot_have_are_refused(tmp_path, options, field):
    folder = write_oracle_model(tmp_path, tokenizer=False, **options)
    with pytest.raises(ModelError) as caught:
        make_engine(folder)
    assert caught.value.field == field


def test_an_arena_on_a_device_that_is_not_there_is_refused(folder):
    for device in ("cuda:99", "meta", "nowhere"):
        with pytest.raises(ConfigError) as caught:
            make_engine(folder, device=device)
        assert caught.value.field == "device"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_arena_on_a_gpu_gives_the_same_answers(folder):
    engine = make_engine(folder, device="cuda:0")
    assert engine.arena.device == 0
    (prompt,) = prompts(29)
    sequence = engine.new_sequence(prompt, GREEDY, b"")
    assert engine.kv.reserve(sequence, len(prompt) + 12, 0)
    for _ in range(12):
        engine.step([Chunk(sequence, sequence.num_pending)])
    assert sequence.tokens[len(prompt) :] == oracle_answer(prompt, 12, 512)
