"""Tokens of the kernels against the torch reference, the engine's sampler, and the distribution."""

import math

import numpy as np
import pytest
import torch
from support.kernel_checks import DEVICE, DTYPES, HAS_GPU, needs_gpu, needs_triton, normal, poisoned

from baton.common.block_hash import root_hash
from baton.common.sampling import SamplingParams
from baton.engine.philox import gumbel, gumbel_at
from baton.engine.sampler import Draw, Sampler
from baton.engine.sequence import Sequence
from baton.kernels.jit import jit, tl
from baton.kernels.philox import gumbel_bound, gumbel_noise, gumbel_noise_triton, gumbel_of_word
from baton.kernels.sampling import SamplingRows, sample, sample_triton, top_logprobs

KINDS = {
    "greedy": {"temperature": 0.0, "top_k": 3, "top_p": 0.5},
    "plain": {},
    "cold": {"temperature": 0.05},
    "hot": {"temperature": 5.0, "top_p": 0.99},
    "top-k": {"top_k": 7},
    "top-p": {"top_p": 0.9},
    "narrow top-p": {"top_p": 0.05},
    "no top-p": {"top_p": 0.0},
    "min-p": {"min_p": 0.02},
    "best by min-p": {"min_p": 1.0},
    "all": {"temperature": 0.8, "top_k": 40, "top_p": 0.8, "min_p": 0.01},
}
# One chunk is 4096 tokens, one block 1024.
VOCABS = [1, 50, 1025, 4173, 8192]
# Infinities and NaN warn where numpy computes with them.
infinities = pytest.mark.filterwarnings("ignore:invalid value|overflow|All-NaN:RuntimeWarning")


def rows_of(*kinds: dict[str, float], seeds: list[int] | None = None) -> SamplingRows:
    """A row per kind; seeds are fresh if not given, positions and choices vary."""
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}

    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        values = [{**defaults, **kind}[name] for kind in kinds]
        return torch.tensor(values, dtype=dtype, device=DEVICE)

    size = len(kinds)
    seed = torch.randint(-(2**63), 2**63 - 1, (size,)) if seeds is None else torch.tensor(seeds)
    return SamplingRows(
        temperature=column("temperature", torch.float32),
        top_k=column("top_k", torch.int32),
        top_p=column("top_p", torch.float32),
        min_p=column("min_p", torch.float32),
        seed=seed.to(torch.int64).to(DEVICE),
        position=torch.arange(size, dtype=torch.int32, device=DEVICE) * 3,
        choice=torch.arange(size, dtype=torch.int32, device=DEVICE) % 2,
    )


def permuted(rows: SamplingRows, order: torch.Tensor) -> SamplingRows:
    fields = {name: getattr(rows, name)[order] for name in SamplingRows.__dataclass_fields__}
    return SamplingRows(**fields)


def tokens_of(logits: torch.Tensor, rows: SamplingRows, **options: object) -> list[int]:
    out = poisoned(logits.shape[0], dtype=torch.int32)
    sample_triton(logits, rows, out=out, **options)
    return out.tolist()


def noise_of_engine(rows: SamplingRows, vocab: int) -> torch.Tensor:
    words = zip(rows.seed.tolist(), rows.position.tolist(), rows.choice.tolist(), strict=True)
    noise = [gumbel(s % 2**64, position, vocab, choice=c) for s, position, c in words]
    return torch.from_numpy(np.stack(noise))


def test_noise_of_the_reference_is_the_engines() -> None:
    rows = rows_of(*[{}] * 5)
    noise = gumbel_noise(rows.seed, rows.position, rows.choice, 3000)
    assert torch.equal(noise.cpu(), noise_of_engine(rows, 3000))


@needs_triton
def test_noise_of_the_kernels_is_the_engines() -> None:
    rows = rows_of(*[{}] * 5)
    out = poisoned(5, 3000, dtype=torch.float32)
    gumbel_noise_triton(rows.seed, rows.position, rows.choice, 3000, out)
    assert torch.equal(out.cpu(), noise_of_engine(rows, 3000))


@jit
def _noise_and_bound(words, noise, bound, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    word = tl.load(words + index).to(tl.uint32)
    tl.store(noise + index, gumbel_of_word(word))
    tl.store(bound + index, gumbel_bound(word))


@needs_triton
def test_bound_on_noise_is_above_and_close_at_the_top() -> None:
    edges = torch.cat([2 ** torch.arange(32), 2**32 - 1 - 2 ** torch.arange(31), torch.tensor([0])])
    words = torch.cat([edges, torch.randint(0, 2**32, (4096 - 64,))]).to(DEVICE)
    noise, bound = poisoned(4096, dtype=torch.float32), poisoned(4096, dtype=torch.float32)
    _noise_and_bound[(1,)](words, noise, bound, SIZE=4096, enable_fp_fusion=False)
    assert (bound >= noise - 1e-4).all()
    assert (bound - noise)[noise > 4].max() < 0.08
    assert noise.min() > -3
    assert bound.max() < 16.65


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_kernels_equal_the_reference(vocab: int, dtype: torch.dtype) -> None:
    """16-bit logits tie often."""
    rows = rows_of(*KINDS.values())
    logits = normal(len(KINDS), vocab, dtype=dtype, scale=2.5)
    expected, logprob = sample(logits, rows, want_logprob=True)
    out, out_logprob = (poisoned(len(KINDS), dtype=d) for d in (torch.int32, torch.float32))
    sample_triton(logits, rows, want_logprob=True, out=out, out_logprob=out_logprob)
    assert out.tolist() == expected.tolist()
    exact = torch.log_softmax(logits.double(), dim=-1).gather(1, out.long()[:, None])[:, 0]
    assert logprob is not None
    assert (logprob - exact).abs().max() < 1e-5
    assert (out_logprob - exact).abs().max() < 1e-5


@needs_triton
def test_kernels_equal_the_engine() -> None:
    vocab, kinds = 5000, list(KINDS.values())
    rows = rows_of(*kinds, seeds=list(range(100, 100 + len(kinds))))
    rows.choice.zero_()
    logits = normal(len(kinds), vocab, dtype=torch.float32, scale=3.0)
    sequences = [
        Sequence(
            tokens=[1, *[2] * position],
            prompt_len=1,
            sampling=SamplingParams(max_tokens=100, seed=seed, **kind),
            tenant_key=b"",
            root=root_hash(b"", ""),
        )
        for kind, seed, position in zip(
            kinds, rows.seed.tolist(), rows.position.tolist(), strict=True
        )
    ]
    expected = Sampler([]).sample(logits.cpu(), [Draw.of(each) for each in sequences])
    assert sample(logits, rows)[0].tolist() == expected
    assert tokens_of(logits, rows) == expected


@needs_triton
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_top_k_of_any_size(scale: float) -> None:
    """4173 tokens are 256 groups of 32, of which the search lists those that matter."""
    vocab = 4173
    sizes = [1, 2, 31, 255, 256, 257, 3000, vocab - 1, vocab, vocab + 9]
    rows = rows_of(*[{"top_k": k, "temperature": 50.0, "top_p": 0.95} for k in sizes])
    logits = normal(len(sizes), vocab, dtype=torch.float32, scale=scale)
    logits[:, 5] = -math.inf
    assert tokens_of(logits, rows) == sample(logits, rows)[0].tolist()


@needs_triton
def test_equals_go_together_and_the_lowest_wins() -> None:
    logits = torch.zeros(3, 5000, device=DEVICE)
    logits[1, 100::7] = 1.0
    greedy = {"temperature": 0.0}
    assert tokens_of(logits, rows_of(greedy, greedy, greedy)) == [0, 100, 0]
    rows = rows_of({"top_k": 1}, {"top_k": 2}, {"top_p": 0.01})
    assert tokens_of(logits, rows) == sample(logits, rows)[0].tolist()
    # A thousand equals, kept together: the draw is not the lowest of them.
    assert tokens_of(logits, rows_of(*[{"top_k": 1}] * 3))[0] != 0


@needs_triton
def test_zeros_of_either_sign_are_equals() -> None:
    """The second greatest is 0, and so are 32 tokens of another group of tokens, spelled -0."""
    logits = torch.full((1, 4096), -5.0)
    logits[0, 0], logits[0, 32], logits[0, 64:96] = 1.0, 0.0, -0.0
    draws = 24
    rows = rows_of(*[{"top_k": 2, "top_p": 0.5}] * draws, seeds=[5] * draws)
    logits = logits.expand(draws, -1).contiguous().to(DEVICE)
    found, expected = sample_triton(logits, rows)[0], sample(logits, rows)[0]
    assert torch.equal(found, expected)
    assert len(found.unique()) > 1, "equals of the second greatest stay"


@needs_triton
def test_rows_apart_are_refused() -> None:
    rows = rows_of({"temperature": 0.7}, {})
    table = torch.stack([rows.temperature, rows.temperature], dim=1)
    apart = SamplingRows(
        **{
            name: table[:, 0] if name == "temperature" else getattr(rows, name)
            for name in SamplingRows.__dataclass_fields__
        }
    )
    with pytest.raises(AssertionError, match="rows follow each other"):
        sample_triton(normal(2, 64, dtype=torch.float32), apart)


@needs_triton
@pytest.mark.parametrize("vocab", [40, 4173])
@infinities
def test_grammar_masks(vocab: int) -> None:
    kinds = [KINDS["greedy"], KINDS["all"], KINDS["plain"], KINDS["top-p"], KINDS["plain"]]
    rows = rows_of(*kinds, KINDS["plain"])
    logits = normal(6, vocab, dtype=torch.float32)
    words = -(-vocab // 32)
    mask = torch.randint(-(2**31), 2**31, (4, words), dtype=torch.int32)
    mask[1] = 0
    mask[1, 37 // 32] = 1 << 37 % 32
    mask[3] = 0
    mask = mask.to(DEVICE)
    mask_row = torch.tensor([0, 0, -1, 2, 1, 3], dtype=torch.int32, device=DEVICE)
    options = {"mask": mask, "mask_row": mask_row, "want_logprob": True}
    found, logprob = sample_triton(logits, rows, **options)
    expected, expected_logprob = sample(logits, rows, **options)
    assert found.tolist() == expected.tolist()
    assert found.tolist()[4:] == [37, -1]
    torch.testing.assert_close(logprob, expected_logprob, atol=1e-5, rtol=0, equal_nan=True)
    for row, token in enumerate(found.tolist()[:4]):
        if row != 2:
            assert (int(mask[mask_row[row], token // 32]) >> token % 32) & 1


@needs_triton
@pytest.mark.parametrize("kind", ["greedy", "plain", "all"])
@infinities
def test_rows_without_a_possible_token(kind: str) -> None:
    logits = normal(6, 4173, dtype=torch.float32)
    logits[0] = -math.inf
    logits[1] = math.nan
    logits[2, 4100] = math.nan
    logits[3, 7] = math.inf
    logits[5] = -math.inf
    logits[5, 4172] = -3.0
    rows = rows_of(*[KINDS[kind]] * 6)
    found = tokens_of(logits, rows)
    assert found == sample(logits, rows)[0].tolist()
    assert found[:4] == [-1] * 4
    assert found[4] >= 0
    assert found[5] == 4172


@needs_triton
def test_a_row_draws_the_same_in_every_batch() -> None:
    rows = rows_of(*KINDS.values())
    logits = normal(len(KINDS), 4173, dtype=torch.float32)
    together = tokens_of(logits, rows)
    order = torch.randperm(len(KINDS)).to(DEVICE)
    assert tokens_of(logits[order], permuted(rows, order)) == [together[i] for i in order.tolist()]
    apart = torch.cat([logits, logits], dim=1)[:, :4173]
    assert tokens_of(apart, rows) == together
    one = torch.tensor([6], device=DEVICE)
    assert tokens_of(logits[one], permuted(rows, one)) == [together[6]]


@needs_triton
def test_the_number_of_rounds_decides_nothing() -> None:
    """Narrow top-p rejects often, so that all rounds and what follows them are needed."""
    rows = rows_of(*[{"top_p": 0.02 * n, "temperature": 3.0} for n in range(4)])
    logits = normal(4, 4173, dtype=torch.float32)
    expected = sample(logits, rows)[0].tolist()
    for rounds in (1, 2, 3):
        assert tokens_of(logits, rows, rounds=rounds) == expected


@needs_triton
def test_draws_below_expectation_are_found() -> None:
    """The first draw looks above log(mass) - 2.5 alone; one in 200,000 lies lower."""
    seed, positions = np.array([11], dtype=np.uint64), np.arange(2_000_000, dtype=np.uint32)
    noise = gumbel_at(seed, positions, np.zeros(1, dtype=np.uint32))
    rare = np.flatnonzero(noise < -2.51)
    assert rare.size
    rows = rows_of({}, {"top_p": 0.5}, seeds=[11, 11])
    rows.position.fill_(int(rare[0]))
    rows.choice.zero_()
    logits = torch.full((2, 40), -math.inf, device=DEVICE)
    logits[:, 0] = 1.5
    for rounds in (1, 2):
        assert tokens_of(logits, rows, rounds=rounds) == [0, 0]


def test_tokens_are_distributed_as_top_p_says() -> None:
    """Chi-square over 20,000 draws with fixed seeds; compiled kernels where there is a GPU."""
    draws, p = 20_000, 0.93
    scores = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -4.0])
    ordered = torch.softmax(scores.double() / 0.9, dim=-1)
    kept = ordered.cumsum(0) - ordered < p
    exact = torch.where(kept, ordered, 0.0) / ordered[kept].sum()
    rows = rows_of(*[{"temperature": 0.9, "top_p": p}] * draws, seeds=[1234] * draws)
    rows.position.copy_(torch.arange(draws))
    rows.choice.zero_()
    logits = scores.expand(draws, -1).contiguous().to(DEVICE)
    found = (sample_triton if HAS_GPU else sample)(logits, rows)[0]
    counts = found.cpu().bincount(minlength=8)
    assert counts[~kept].sum() == 0
    expected = exact[kept] * draws
    chi_square = float(((counts[kept] - expected) ** 2 / expected).sum())
    # 99.9th percentile at 4 degrees of freedom.
    assert int(kept.sum()) == 5
    assert chi_square < 18.5


@needs_triton
def test_no_rows_are_no_work() -> None:
    assert sample_triton(poisoned(0, 8, dtype=torch.float32), rows_of())[0].shape == (0,)


@needs_gpu
def test_a_graph_replays_with_other_parameters() -> None:
    """Nothing looks at a tensor on the host."""
    kinds = list(KINDS.values())
    rows, logits = rows_of(*kinds), normal(len(kinds), 128_256, dtype=torch.float32)
    out = poisoned(len(kinds), dtype=torch.int32)
    sample_triton(logits, rows, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample_triton(logits, rows, out=out)
    others = rows_of(*reversed(kinds))
    for name in SamplingRows.__dataclass_fields__:
        getattr(rows, name).copy_(getattr(others, name))
    logits.copy_(normal(len(kinds), 128_256, dtype=torch.float32))
    graph.replay()
    assert out.tolist() == sample(logits, rows)[0].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_top_logprobs(dtype: torch.dtype) -> None:
    logits = normal(3, 500, dtype=dtype, scale=4.0)
    tokens, logprobs = top_logprobs(logits, 5)
    exact = torch.log_softmax(logits.double(), dim=-1)
    assert (logprobs - exact.gather(1, tokens.long())).abs().max() < 1e-5
    assert (logprobs - exact.topk(5).values).abs().max() < 1e-5
