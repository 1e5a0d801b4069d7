"""Edits of single logits: bias, penalties, tokens that must not come yet.

Few rows ask for them and few tokens of a row are concerned, so that the edits are a list and
nothing else of a row is touched. For each listed token, in the order of `baton.engine.sampler`:

    1. x += bias
    2. if seen in prompt or output: x / repetition if x > 0, else x * repetition
    3. x -= presence (if its output count is not 0) + frequency * output count
    4. if banned: -inf

in fp32, each step rounded, and the result rounded once to the dtype of the logits.
"""

from dataclasses import dataclass, fields

import torch

from baton.kernels.jit import can_overlap_launches, gdc_launch_dependents, gdc_wait, jit, tl

SEEN = 1
BANNED = 2

BLOCK = 256
# Programs per row; each takes every SPLITS-th block of its row's entries.
SPLITS = 8

_SEEN = tl.constexpr(SEEN)
_BANNED = tl.constexpr(BANNED)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitEdits:
    """Edits of R rows, N entries in all; tensors on the device of the logits.

    Entries `[row_offsets[r], row_offsets[r + 1])` belong to row `rows[r]`; a token is listed at
    most once per row. A range that is empty edits nothing, whatever its row: padding.
    """

    row_offsets: torch.Tensor  # int32 [R + 1]
    rows: torch.Tensor  # int32 [R]
    repetition: torch.Tensor  # fp32 [R]; 1 is off
    presence: torch.Tensor  # fp32 [R]; 0 is off
    frequency: torch.Tensor  # fp32 [R]; 0 is off
    token: torch.Tensor  # int32 [N]
    bias: torch.Tensor  # fp32 [N]
    output_count: torch.Tensor  # int32 [N]: occurrences in the output
    flags: torch.Tensor  # int32 [N]: SEEN | BANNED


def edit_logits(logits: torch.Tensor, edits: LogitEdits) -> torch.Tensor:
    """Edits `logits` `[S, V]` (fp32, fp16 or bf16) in place and returns them."""
    counts = edits.row_offsets.diff().long()
    entry_row = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    first = int(edits.row_offsets[0])
    entries = slice(first, first + entry_row.numel())
    row, token = edits.rows[entry_row].long(), edits.token[entries].long()
    flags, count = edits.flags[entries], edits.output_count[entries].float()
    x = logits[row, token].float() + edits.bias[entries]
    repetition = edits.repetition[entry_row]
    penalized = torch.where(x > 0, x / repetition, x * repetition)
    x = torch.where((flags & SEEN) != 0, penalized, x)
    presence = torch.where(count > 0, edits.presence[entry_row], 0.0)
    x = x - (presence + edits.frequency[entry_row] * count)
    x = x.masked_fill((flags & BANNED) != 0, float("-inf"))
    logits[row, token] = x.to(logits.dtype)
    return logits


def edit_logits_triton(logits: torch.Tensor, edits: LogitEdits) -> torch.Tensor:
    """`edit_logits` without looking at the edits on the host; rows of `logits` may be apart."""
    assert logits.stride(1) == 1, "tokens of a row follow each other"
    num_rows = edits.rows.shape[0]
    for field in fields(edits):
        assert getattr(edits, field.name).is_contiguous(), "entries follow each other"
    if not num_rows:
        return logits
    pdl = can_overlap_launches(logits)
    _edit_logits_kernel[(num_rows, SPLITS)](
        logits,
        logits.stride(0),
        edits.row_offsets,
        edits.rows,
        edits.repetition,
        edits.presence,
        edits.frequency,
        edits.token,
        edits.bias,
        edits.output_count,
        edits.flags,
        BLOCK=BLOCK,
        PDL=pdl,
        num_warps=2,
        enable_fp_fusion=False,
        **({"launch_pdl": True} if pdl else {}),
    )
    return logits


@jit
def _edit_logits_kernel(
    logits, stride, row_offsets, rows, repetition, presence, frequency,
    token, bias, output_count, flags, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (r, b): blocks b, b + SPLITS, ... of the entries of edited row r."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    place = tl.program_id(0)
    end = tl.load(row_offsets + place + 1)
    start = tl.load(row_offsets + place) + tl.program_id(1) * BLOCK
    if start < end:
        row_logits = logits + tl.load(rows + place).to(tl.int64) * stride
        repeated = tl.load(repetition + place)
        present = tl.load(presence + place)
        frequent = tl.load(frequency + place)
        while start < end:
            entry = start + tl.arange(0, BLOCK)
            mask = entry < end
            target = row_logits + tl.load(token + entry, mask=mask, other=0)
            x = tl.load(target, mask=mask, other=0.0).to(tl.float32)
            x += tl.load(bias + entry, mask=mask, other=0.0)
            flag = tl.load(flags + entry, mask=mask, other=0)
            penalized = tl.where(x > 0, tl.div_rn(x, repeated), x * repeated)
            x = tl.where((flag & _SEEN) != 0, penalized, x)
            count = tl.load(output_count + entry, mask=mask, other=0).to(tl.float32)
            x -= tl.where(count > 0, present, 0.0) + frequent * count
            x = tl.where((flag & _BANNED) != 0, -float("inf"), x)
            tl.store(target, x.to(logits.dtype.element_ty), mask=mask)
            start += tl.num_programs(1) * BLOCK
