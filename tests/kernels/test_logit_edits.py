"""Edits of listed logits against the engine's steps and fp64; nothing else is touched."""

import math

import pytest
import torch
from support.kernel_checks import DEVICE, DTYPES, TOLERANCE, needs_triton, normal

from baton.common.block_hash import root_hash
from baton.common.sampling import SamplingParams
from baton.engine.sampler import Draw, Sampler
from baton.engine.sequence import Sequence
from baton.kernels.logit_edits import BANNED, SEEN, LogitEdits, edit_logits, edit_logits_triton

KERNELS = [edit_logits, pytest.param(edit_logits_triton, marks=needs_triton)]


def fresh_edits(vocab: int, sizes: list[int], rows: list[int]) -> LogitEdits:
    """Random edits of `sizes[r]` tokens of `rows[r]`."""
    total = sum(sizes)
    tokens = [torch.randperm(vocab)[:size] for size in sizes]
    edits = {
        "row_offsets": torch.tensor([0, *sizes]).cumsum(0).int(),
        "rows": torch.tensor(rows).int(),
        "repetition": 1 + torch.rand(len(rows)),
        "presence": torch.randn(len(rows)),
        "frequency": torch.randn(len(rows)),
        "token": torch.cat(tokens).int(),
        "bias": torch.randn(total) * (torch.rand(total) < 0.5),
        "output_count": torch.randint(0, 3, (total,)).int(),
        "flags": torch.randint(0, 4, (total,)).int() & (SEEN | BANNED),
    }
    return LogitEdits(**{name: tensor.to(DEVICE) for name, tensor in edits.items()})


def exact(logits: torch.Tensor, edits: LogitEdits) -> torch.Tensor:
    out = logits.double().cpu()
    offsets = edits.row_offsets.tolist()
    for r, row in enumerate(edits.rows.tolist()):
        for entry in range(offsets[r], offsets[r + 1]):
            token, flags = int(edits.token[entry]), int(edits.flags[entry])
            count, repetition = int(edits.output_count[entry]), float(edits.repetition[r])
            x = float(out[row, token]) + float(edits.bias[entry])
            if flags & SEEN:
                x = x / repetition if x > 0 else x * repetition
            x -= float(edits.presence[r]) * (count > 0) + float(edits.frequency[r]) * count
            out[row, token] = -math.inf if flags & BANNED else x
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("edit", KERNELS)
def test_edits_equal_fp64(edit, dtype: torch.dtype) -> None:
    """One row has more entries than all programs of a row take at once; one has none."""
    logits = normal(6, 3001, dtype=dtype)
    edits = fresh_edits(3001, [1, 2500, 0, 300], rows=[5, 2, 3, 0])
    expected = exact(logits, edits)
    found = edit(logits.clone(), edits).double().cpu()
    assert torch.equal(found.isinf(), expected.isinf())
    possible = ~expected.isinf()
    error = (found - expected)[possible].norm() / expected[possible].norm()
    assert error < TOLERANCE[dtype]
    untouched = torch.tensor([1, 3, 4])
    assert torch.equal(found[untouched], logits.double().cpu()[untouched])


@pytest.mark.parametrize("edit", KERNELS)
def test_edits_equal_the_engine_bit_for_bit(edit) -> None:
    vocab, prompt, output = 300, [5, 7, 7, 9], [9, 30, 30, 30]
    sampling = SamplingParams(
        max_tokens=10,
        repetition_penalty=1.3,
        presence_penalty=0.6,
        frequency_penalty=0.3,
        min_tokens=8,
        stop_token_ids=(30, 77),
        logit_bias=((7, 2.5), (99, -1.0)),
    )
    sequence = Sequence(
        tokens=prompt + output,
        prompt_len=len(prompt),
        sampling=sampling,
        tenant_key=b"",
        root=root_hash(b"", ""),
    )
    logits = normal(1, vocab, dtype=torch.float32, scale=3.0)
    expected = Sampler([3])._adjusted(logits[0].cpu(), Draw.of(sequence))
    token = [5, 7, 9, 30, 77, 99, 3]
    entries = {
        "bias": [{7: 2.5, 99: -1.0}.get(t, 0.0) for t in token],
        "output_count": [output.count(t) for t in token],
        "flags": [
            SEEN * (t in prompt + output) | BANNED * (t in (3, *sampling.stop_token_ids))
            for t in token
        ],
    }
    edits = LogitEdits(
        row_offsets=torch.tensor([0, len(token)], dtype=torch.int32, device=DEVICE),
        rows=torch.zeros(1, dtype=torch.int32, device=DEVICE),
        repetition=torch.tensor([1.3], device=DEVICE),
        presence=torch.tensor([0.6], device=DEVICE),
        frequency=torch.tensor([0.3], device=DEVICE),
        token=torch.tensor(token, dtype=torch.int32, device=DEVICE),
        bias=torch.tensor(entries["bias"], device=DEVICE),
        output_count=torch.tensor(entries["output_count"], dtype=torch.int32, device=DEVICE),
        flags=torch.tensor(entries["flags"], dtype=torch.int32, device=DEVICE),
    )
    assert torch.equal(edit(logits, edits)[0].cpu(), expected)


@needs_triton
def test_rows_apart_and_padding() -> None:
    wide = normal(3, 1000, dtype=torch.float32)
    logits = wide[:, 100:600]
    edits = fresh_edits(500, [20, 0, 0], rows=[1, 1, 1])
    expected = edit_logits(logits.clone(), edits)
    before = wide.clone()
    edit_logits_triton(logits, edits)
    assert torch.equal(logits, expected)
    assert torch.equal(wide[:, :100], before[:, :100])
    assert torch.equal(wide[:, 600:], before[:, 600:])


@needs_triton
def test_no_rows_are_no_work() -> None:
    logits = normal(2, 8, dtype=torch.float32)
    assert torch.equal(edit_logits_triton(logits.clone(), fresh_edits(8, [0], [0])), logits)
