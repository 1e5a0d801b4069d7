"""Sampling 256 rows of a vocabulary of 128256: the time allowed for it, and sorting in torch.

Logits are normal with a standard deviation of 3, so that a nucleus holds a few thousand tokens.
Logits are read once at least: bytes per second of that reading stand in the details.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

from baton.common.errors import InternalError
from baton.kernels.bench.figures import Figure
from baton.kernels.bench.geometry import VOCAB
from baton.kernels.bench.harness import Call, Context, normal, poison_
from baton.kernels.sampling import SamplingRows, sample, sample_triton

NUM_ROWS: Final = 256
# A set is 131 MB in fp32: twice the cache.
NUM_SETS: Final = 4
LOGIT_SCALE: Final = 3.0
TOP_P: Final = 0.9
ALLOWED_MS: Final = 0.3
CHECKED_ROWS: Final = 32
# Sums of another order may decide a token at the border of top-p otherwise.
MAY_DIFFER: Final = 1


@dataclass(frozen=True)
class Case:
    name: str
    what: str
    dtype: torch.dtype
    temperature: float
    top_p: float
    # 1 where nothing is ever rejected.
    rounds: int
    allowed_ms: float | None


CASES: Final = (
    Case("sampling top-p", f"top-p {TOP_P}, fp32 logits", torch.float32, 1.0, TOP_P, 4, ALLOWED_MS),
    Case("sampling top-p bf16", f"top-p {TOP_P}, bf16", torch.bfloat16, 1.0, TOP_P, 4, None),
    Case("sampling top-p 0.5", "top-p 0.5, fp32", torch.float32, 1.0, 0.5, 4, None),
    Case("sampling top-p 0.1", "top-p 0.1, fp32", torch.float32, 1.0, 0.1, 4, None),
    Case("sampling greedy", "the best token, fp32 logits", torch.float32, 0.0, 1.0, 1, None),
    Case("sampling greedy bf16", "the best token, bf16", torch.bfloat16, 0.0, 1.0, 1, None),
)


def measure(context: Context) -> Iterator[Figure]:
    for case in CASES:
        context.say(case.name)
        sets = [
            normal(NUM_ROWS, VOCAB, device=context.device, dtype=case.dtype, scale=LOGIT_SCALE)
            for _ in range(NUM_SETS)
        ]
        rows = [_rows(case, context.device) for _ in sets]
        _check(case, sets[0], rows[0])
        out = torch.empty(NUM_ROWS, dtype=torch.int32, device=context.device)
        calls: list[Call] = [
            partial(sample_triton, logits, how, rounds=case.rounds, out=out)
            for logits, how in zip(sets, rows, strict=True)
        ]
        seconds = context.seconds_per_call(calls)
        rival = partial(_sort, top_p=case.top_p) if case.temperature else _argmax
        rival_seconds = context.seconds_per_call([partial(rival, logits) for logits in sets])
        bytes_per_s = sets[0].nbytes / seconds
        yield Figure(
            name=case.name,
            what=f"{NUM_ROWS} rows of {VOCAB}: {case.what}",
            achieved=seconds * 1e3,
            unit="ms",
            limit=case.allowed_ms or sets[0].nbytes / context.copy_rate * 1e3,
            limit_name="allowed" if case.allowed_ms else "one reading at the copy rate",
            rival=rival_seconds * 1e3,
            rival_name="torch sort" if case.temperature else "torch argmax",
            target=1.0 if case.allowed_ms else None,
            less_is_better=True,
            details={
                "us": seconds * 1e6,
                "logits_bytes": sets[0].nbytes,
                "logits_gb_per_s": bytes_per_s / 1e9,
                "of_copy_rate": bytes_per_s / context.copy_rate,
            },
        )


def _rows(case: Case, device: torch.device) -> SamplingRows:
    """All rows alike but for their seeds and positions."""

    def all_rows(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((NUM_ROWS,), value, dtype=dtype, device=device)

    return SamplingRows(
        temperature=all_rows(case.temperature, torch.float32),
        top_k=all_rows(0, torch.int32),
        top_p=all_rows(case.top_p, torch.float32),
        min_p=all_rows(0.0, torch.float32),
        seed=torch.randint(2**62, (NUM_ROWS,), device=device),
        position=torch.randint(2**20, (NUM_ROWS,), device=device, dtype=torch.int32),
        choice=all_rows(0, torch.int32),
    )


def _check(case: Case, logits: torch.Tensor, rows: SamplingRows) -> None:
    """The tokens of the reference, of as many rows as its sorting takes quickly."""
    out = poison_(torch.empty(NUM_ROWS, dtype=torch.int32, device=logits.device))
    sample_triton(logits, rows, rounds=case.rounds, out=out)
    few = SamplingRows(**{name: getattr(rows, name)[:CHECKED_ROWS] for name in rows.__slots__})
    expected, _ = sample(logits[:CHECKED_ROWS], few)
    differing = int((out[:CHECKED_ROWS] != expected).sum())
    impossible = int(((out < 0) | (out >= VOCAB)).sum())
    if impossible or differing > (MAY_DIFFER if case.temperature else 0):
        raise InternalError(
            f"{case.name}: {differing} of {CHECKED_ROWS} tokens differ from the reference and "
            f"{impossible} are none; no figure is taken of a wrong result"
        )


def _sort(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Top-p as it is written in torch: sorted, cut at the cumulative sum, drawn."""
    ordered, order = logits.float().sort(dim=-1, descending=True)
    likelihood = ordered.softmax(dim=-1)
    before = likelihood.cumsum(dim=-1) - likelihood
    likelihood.masked_fill_(before >= top_p, 0.0)
    drawn = likelihood.div_(torch.empty_like(likelihood).exponential_()).argmax(dim=-1)
    return order.gather(1, drawn[:, None])


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(dim=-1)
