"""Every sampling parameter against an independent implementation, and finish reasons."""

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from baton.common.block_hash import root_hash
from baton.common.sampling import FinishReason, SamplingParams
from baton.engine.finish import finish_reason
from baton.engine.philox import gumbel
from baton.engine.sampler import Draw, Sampler, keep_min_p, keep_top_k, keep_top_p
from baton.engine.sequence import Sequence

VOCAB = 40
EOS = 3


def sequence(prompt=(1, 2), output=(), **sampling) -> Sequence:
    return Sequence(
        tokens=[*prompt, *output],
        prompt_len=len(prompt),
        sampling=SamplingParams(**{"max_tokens": 100, **sampling}),
        tenant_key=b"",
        root=root_hash(b"", ""),
    )


def draw(*args, **kwargs) -> Draw:
    return Draw.of(sequence(*args, **kwargs))


def logits(rows=1, seed=0, scale=3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def sample_one(row: torch.Tensor, **kwargs) -> int:
    return Sampler([EOS]).sample(row.view(1, -1), [draw(**kwargs)])[0]


def expected_draw(scores: torch.Tensor, seed: int, position: int) -> int:
    """Gumbel-max spelled out."""
    return int(np.argmax(scores.numpy() + gumbel(seed, position, VOCAB)))


def test_greedy_batch_is_argmax():
    rows = logits(5)
    draws = [draw(temperature=0.0) for _ in range(5)]
    assert Sampler([EOS]).sample(rows, draws) == rows.argmax(-1).tolist()


def test_empty_batch():
    assert Sampler([EOS]).sample(torch.empty(0, VOCAB), []) == []


def test_mixed_batch_equals_rows_alone_and_leaves_the_logits():
    rows = logits(6)
    before = rows.clone()
    kinds = [
        {"temperature": 0.0},
        {"seed": 5},
        {"temperature": 0.0, "repetition_penalty": 1.5, "output": (4, 5)},
        {"top_k": 3, "top_p": 0.8, "min_p": 0.1, "temperature": 0.7},
        {"temperature": 0.0, "min_tokens": 2},
        {"temperature": 0.0, "logit_bias": ((7, 100.0),)},
    ]
    together = Sampler([EOS]).sample(rows, [draw(**kind) for kind in kinds])
    alone = [sample_one(row, **kind) for row, kind in zip(rows, kinds, strict=True)]
    assert together == alone
    assert torch.equal(rows, before)
    assert together[5] == 7


@pytest.mark.parametrize("seed", range(5))
def test_repetition_penalty_as_hugging_face(seed):
    row = logits(seed=seed)
    prompt, output = (1, 5, 5), (9, 30)
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[*prompt, *output]]), row.clone())
    ours = Sampler([])._adjusted(row[0], draw(prompt, output, repetition_penalty=1.7))
    torch.testing.assert_close(ours, theirs[0])


def test_presence_and_frequency_count_output_tokens_only():
    row = logits()[0]
    found = Sampler([])._adjusted(
        row, draw((1, 8), (8, 9, 9, 9), presence_penalty=0.5, frequency_penalty=0.25)
    )
    expected = row.clone()
    expected[8] -= 0.5 + 0.25
    expected[9] -= 0.5 + 0.75
    torch.testing.assert_close(found, expected)


def test_logit_bias_is_added_before_penalties():
    row = torch.zeros(VOCAB)
    found = Sampler([])._adjusted(
        row, draw((1, 2), logit_bias=((2, 4.0), (5, -1.0)), repetition_penalty=2.0)
    )
    assert (found[2], found[5], found[1]) == (2.0, -1.0, 0.0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("top_k", [1, 7, 1000])
def test_top_k_as_hugging_face(seed, top_k):
    row = logits(seed=seed)
    theirs = TopKLogitsWarper(min(top_k, VOCAB))(None, row)
    assert torch.equal(keep_top_k(row[0], top_k), theirs[0])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.93])
def test_top_p_as_hugging_face(seed, top_p):
    row = logits(seed=seed)
    assert torch.equal(keep_top_p(row[0], top_p), TopPLogitsWarper(top_p)(None, row)[0])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("min_p", [0.02, 0.5, 1.0])
def test_min_p_as_hugging_face(seed, min_p):
    row = logits(seed=seed)
    assert torch.equal(keep_min_p(row[0], min_p), MinPLogitsWarper(min_p)(None, row)[0])


@pytest.mark.parametrize("seed", range(10))
def test_all_filters_in_the_documented_order(seed):
    row = logits(seed=seed)
    scores = row / 0.8
    for warper in (TopKLogitsWarper(12), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)):
        scores = warper(None, scores)
    kwargs = {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.05, "seed": seed}
    assert sample_one(row, output=(4, 4), **kwargs) == expected_draw(scores[0], seed, position=2)


def test_min_tokens_makes_eos_and_stop_tokens_impossible():
    row = torch.zeros(VOCAB)
    row[EOS], row[6], row[9] = 50.0, 40.0, 30.0
    early = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (6, 10**6)}
    assert sample_one(row, **early) == 9
    assert sample_one(row, **early, output=(1,)) == 9
    assert sample_one(row, **early, output=(1, 1)) == EOS
    assert sample_one(row, temperature=0.0, min_tokens=1) == 6
    assert Sampler([]).sample(row.view(1, -1), [draw(temperature=0.0, min_tokens=1)]) == [EOS]


def test_tiny_temperature_is_greedy_without_overflow():
    row = logits()[0]
    assert sample_one(row, temperature=1e-30) == int(row.argmax())


def test_draw_depends_on_seed_and_position_alone():
    row = logits(scale=0.1)[0]
    first = [sample_one(row, seed=11, output=(0,) * position) for position in range(20)]
    again = [sample_one(row, seed=11, prompt=(5,), output=(7,) * at) for at in range(20)]
    other = [sample_one(row, seed=12, output=(0,) * position) for position in range(20)]
    assert first == again
    assert first != other
    assert len(set(first)) > 5


def test_draws_follow_the_softmax():
    row = logits(scale=1.0)[0]
    probabilities = torch.softmax(row.double(), -1).numpy()
    draws = 4000
    counts = np.bincount([sample_one(row, seed=seed) for seed in range(draws)], minlength=VOCAB)
    expected = probabilities * draws
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # 99.9 % point of the distribution with 39 degrees of freedom.
    assert chi_square < 72.1


def test_impossible_logits_are_noticed():
    with pytest.raises(AssertionError, match="not numbers"):
        sample_one(torch.full((VOCAB,), float("nan")))


@pytest.mark.parametrize(
    ("output", "sampling", "expected"),
    [
        ((5,), {}, None),
        ((5, EOS), {}, FinishReason.STOP),
        ((EOS, 5), {}, None),
        ((5, EOS), {"ignore_eos": True}, None),
        ((5, 9), {"stop_token_ids": (9,)}, FinishReason.STOP),
        ((5, 9), {"stop_token_ids": (9,), "ignore_eos": True}, FinishReason.STOP),
        ((5, EOS), {"min_tokens": 2}, None),
        ((5, 6, EOS), {"min_tokens": 2}, FinishReason.STOP),
        ((5, 6), {"max_tokens": 2}, FinishReason.LENGTH),
        ((5, EOS), {"max_tokens": 2}, FinishReason.STOP),
        ((5, EOS), {"max_tokens": 2, "min_tokens": 2}, FinishReason.LENGTH),
        ((5,) * 8, {}, FinishReason.LENGTH),
    ],
)
def test_finish_reason(output, sampling, expected):
    assert finish_reason(sequence((1, 2), output, **sampling), [EOS], 10) == expected
