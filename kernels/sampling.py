"""From rows of logits to tokens on the device.

The steps of `baton.engine.sampler` that follow its edits of logits (see `logit_edits`), in its
order, with its noise: grammar mask, temperature, top-k, top-p, min-p, Gumbel-max.

    scores   (x - max) / temperature in fp32; temperature 0 takes the best, lowest id among equals
    top-k    keeps the k-th greatest, what is greater and what equals it
    top-p    over what top-k left: keeps a token when less than p of the mass is strictly more
             likely than it; the best always stays. Equals stay or go together; the engine's
             sort parts them, which differs on exact ties alone
    min-p    keeps tokens at least min_p times as likely as the best
    draw     the greatest score + noise, lowest id among equals

The kernels do not sort. The greatest score + noise of all tokens, if it lies in the kept set, is
the greatest of the kept set. If the winner is rejected, all that is not more likely lies outside
the kept set too, and the next winner is drawn from what is strictly more likely (rejection, as in
FlashInfer's sorting-free sampling, 2025). top-k and min-p bound the logit before any draw. At p =
0.9 one row in ten needs a second draw. Sums are fp32: whether a token at the very border of top-p
stays may differ from the reference; a row decides the same in every batch.
"""

from dataclasses import dataclass, fields
from typing import Final

import torch

from baton.kernels.jit import can_overlap_launches, cdiv, next_power_of_2
from baton.kernels.philox import gumbel_noise
from baton.kernels.sampling_draw import draw_kernel, finish_kernel, verify_kernel
from baton.kernels.sampling_plan import plan_kernel, stats_kernel

CHUNK = 4096
BLOCK = 1024
GROUP = 32
TILE = 64
NEVER: Final = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRows:
    """How each of S rows is sampled; tensors `[S]` on the device of the logits."""

    temperature: torch.Tensor  # fp32; 0 is greedy, and filters and noise do not matter
    top_k: torch.Tensor  # int32; 0 is off
    top_p: torch.Tensor  # fp32; 1 is off
    min_p: torch.Tensor  # fp32; 0 is off
    seed: torch.Tensor  # int64: the bits of a seed in [0, 2^64)
    position: torch.Tensor  # int32
    choice: torch.Tensor  # int32


def sample(
    logits: torch.Tensor,
    rows: SamplingRows,
    *,
    mask: torch.Tensor | None = None,
    mask_row: torch.Tensor | None = None,
    want_logprob: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens int32 `[S]` from logits `[S, V]` (fp32, fp16 or bf16); -1 where no token is possible:
    a logit that counts is NaN or +inf, or all are -inf.

    `mask` int32 `[masks, ceil(V / 32)]`: bit t % 32 of word t // 32 allows token t; `mask_row`
    int32 `[S]` picks a row's mask, -1 for none. Also, if wanted, the fp32 log-probability of each
    token under the logits as given, before mask, temperature and filters; NaN for -1.
    """
    vocab = logits.shape[1]
    raw = logits.float()
    values = raw
    if mask is not None and mask_row is not None:
        token = torch.arange(vocab, device=logits.device)
        words = mask[mask_row.clamp_min(0).long()][:, token // 32]
        allowed = (words >> (token % 32).to(torch.int32)) & 1
        values = raw.masked_fill((allowed == 0) & (mask_row >= 0)[:, None], NEVER)
    highest = values.amax(dim=-1, keepdim=True)
    possible = highest[:, 0].isfinite() & ~values.isnan().any(dim=-1)
    values = values.masked_fill(~possible[:, None], 0.0)
    highest = values.amax(dim=-1, keepdim=True)
    greedy = rows.temperature <= 0
    scores = (values - highest) / rows.temperature.masked_fill(greedy, 1.0)[:, None]
    kept = _kept(scores, rows)
    noise = gumbel_noise(rows.seed, rows.position, rows.choice, vocab)
    drawn = torch.where(kept, scores + noise, NEVER)
    best = torch.where(greedy[:, None], values, drawn)
    tokens = (best == best.amax(dim=-1, keepdim=True)).int().argmax(dim=-1)
    tokens = torch.where(possible, tokens, -1).to(torch.int32)
    if not want_logprob:
        return tokens, None
    chosen = raw.gather(1, tokens.clamp_min(0).long()[:, None])[:, 0] - raw.logsumexp(dim=-1)
    return tokens, torch.where(possible, chosen, torch.nan)


def _kept(scores: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Which tokens the filters keep, bool `[S, V]`."""
    vocab = scores.shape[1]
    ordered = scores.sort(dim=-1, descending=True).values
    k = torch.where(rows.top_k > 0, rows.top_k, vocab).clamp_max(vocab).long()
    kept = scores >= ordered.gather(1, k[:, None] - 1)
    likelihood = torch.where(kept, scores, NEVER).double().exp()
    ordered = torch.where(ordered >= ordered.gather(1, k[:, None] - 1), ordered, NEVER)
    sizes = ordered.double().exp()
    before = sizes.cumsum(dim=-1) - sizes
    # Equals follow each other, and the first of them has before it what is strictly above all.
    p = torch.where(rows.top_p < 1, rows.top_p, torch.inf).double()[:, None]
    inside = (before < p * likelihood.sum(dim=-1, keepdim=True)).sum(dim=-1, keepdim=True)
    kept &= scores >= ordered.gather(1, inside.clamp_min(1) - 1)
    return kept & (scores.double().exp() >= rows.min_p.double()[:, None])


def _check_rows(
    num_rows: int,
    rows: SamplingRows,
    mask: torch.Tensor | None,
    mask_row: torch.Tensor | None,
    out: torch.Tensor | None,
    out_logprob: torch.Tensor | None,
) -> None:
    per_row = [getattr(rows, field.name) for field in fields(rows)]
    for tensor in (*per_row, mask_row, out, out_logprob):
        if tensor is not None:
            assert tensor.shape == (num_rows,), "a number for each row"
            assert tensor.is_contiguous(), "rows follow each other"
    if mask is not None:
        assert mask.is_contiguous(), "words of a mask follow each other"


def sample_triton(
    logits: torch.Tensor,
    rows: SamplingRows,
    *,
    mask: torch.Tensor | None = None,
    mask_row: torch.Tensor | None = None,
    want_logprob: bool = False,
    rounds: int = 4,
    out: torch.Tensor | None = None,
    out_logprob: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`sample` by rejection. Rows of `logits` may be apart; everything else is contiguous.

    `rounds` draws are spread over the device, one program per chunk; rows that need more go on in
    one program each, slowly. It changes the speed alone: 1 is best where no row has top-p, more
    than 4 where p is small (of rows with p = 0.5 one in 250 needs more, with p = 0.1 one in 14).
    """
    num_rows, vocab = logits.shape
    assert logits.stride(1) == 1, "tokens of a row follow each other"
    assert rounds > 0, "a token needs a draw"
    assert (mask is None) == (mask_row is None), "rows pick among masks"
    _check_rows(num_rows, rows, mask, mask_row, out, out_logprob)
    device = logits.device
    if out is None:
        out = torch.empty(num_rows, dtype=torch.int32, device=device)
    if want_logprob and out_logprob is None:
        out_logprob = torch.empty(num_rows, dtype=torch.float32, device=device)
    if not num_rows:
        return out, out_logprob
    chunks = cdiv(vocab, CHUNK)
    groups = chunks * (CHUNK // GROUP)
    # Chunks' max and sum, with and without mask and temperature; then per round scores and masses.
    sums = torch.empty(4 + 2 * rounds, num_rows, chunks, dtype=torch.float32, device=device)
    tokens = torch.empty(rounds, num_rows, chunks, dtype=torch.int32, device=device)
    group_max = torch.empty(num_rows, groups, dtype=torch.float32, device=device)
    members = torch.empty(num_rows, groups, dtype=torch.int32, device=device)
    plan = torch.empty(num_rows, 4, dtype=torch.float32, device=device)
    chunk_max, chunk_sum, raw_max, raw_sum = sums[:4].unbind()
    scores, above = sums[4 : 4 + rounds], sums[4 + rounds :]
    masked = mask is not None
    words = cdiv(vocab, 32)
    assert mask is None or mask.shape[1] == words, "a bit per token"
    pdl = can_overlap_launches(logits)
    launch = {"MASKED": masked, "PDL": pdl, "num_warps": 4, "enable_fp_fusion": False}
    if pdl:
        launch["launch_pdl"] = True
    source = (logits, logits.stride(0), vocab, mask if masked else logits, mask_row, words)
    spread = (chunks, num_rows)
    stats_kernel[spread](
        *source, rows.temperature, rows.top_k, chunk_max, chunk_sum, group_max, raw_max, raw_sum,
        CHUNK=CHUNK, GROUP=GROUP, LOGPROB=want_logprob, **launch,
    )  # fmt: skip
    padded = next_power_of_2(chunks)
    plan_kernel[(num_rows,)](
        *source, rows.temperature, rows.top_k, rows.min_p, chunk_max, chunk_sum, group_max,
        members, groups, chunks, plan, CHUNKS=padded, GROUPS=next_power_of_2(groups),
        GROUP=GROUP, TILE=TILE, **{**launch, "num_warps": 8},
    )  # fmt: skip
    random = (rows.seed, rows.position, rows.choice)
    rest = {"CHUNKS": padded, "CHUNK": CHUNK, **launch}
    draws = (chunk_max, plan, scores, tokens, above, num_rows * chunks)
    for number in range(rounds):
        draw_kernel[spread](
            *source, rows.temperature, rows.top_p, *random, *draws,
            ROUND=number, BLOCK=BLOCK, **rest,
        )  # fmt: skip
        verify_kernel[spread](*source, rows.temperature, rows.top_p, *draws, ROUND=number, **rest)
    finish_kernel[(num_rows,)](
        *source, rows.temperature, rows.top_p, *random, chunk_max, plan,
        scores[-1], tokens[-1], above[-1], raw_max, raw_sum, chunks, out, out_logprob,
        BLOCK=BLOCK, LOGPROB=want_logprob, **rest,
    )  # fmt: skip
    return out, out_logprob


def top_logprobs(logits: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `n` likeliest tokens int32 `[R, n]` of rows of logits `[R, V]`, and their fp32
    log-probabilities, likeliest first; for the few rows that ask, in torch."""
    values, tokens = torch.topk(logits.float(), n, dim=-1)
    total = torch.logsumexp(logits.float(), dim=-1, keepdim=True)
    return tokens.to(torch.int32), values - total
