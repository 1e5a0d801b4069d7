"""Promised tokens are taken from where the step before left them."""

import pytest
import torch
from support.kernel_checks import DEVICE, needs_triton, poisoned

from baton.kernels.step_inputs import (
    StagedStep,
    resolve_tokens,
    resolve_tokens_triton,
    stage_decode,
    stage_decode_triton,
)

SAMPLED = [70, 71, -1, 73]


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@needs_triton
@pytest.mark.parametrize("repeats", [1, 100])
def test_kernel_equals_reference(repeats: int) -> None:
    source = ints(5, -1, 0, -4, -3, 127_999).repeat(repeats)
    sampled = ints(*SAMPLED)
    out = resolve_tokens_triton(source, sampled)
    assert torch.equal(out, resolve_tokens(source, sampled))
    assert out.tolist() == [5, 70, 0, 73, -1, 127_999] * repeats


@needs_triton
def test_in_place_and_without_promises() -> None:
    source = ints(3, 4)
    assert resolve_tokens_triton(source, ints(*SAMPLED), out=source) is source
    assert source.tolist() == [3, 4]
    assert resolve_tokens(source, ints()).tolist() == [3, 4]
    assert resolve_tokens_triton(ints(), ints(*SAMPLED)).shape == (0,)


@needs_triton
@pytest.mark.parametrize(("num_tables", "width", "num_list"), [(3, 5, 8), (1, 300, 700), (4, 0, 4)])
def test_staging_fills_the_corners_alone(num_tables: int, width: int, num_list: int) -> None:
    per_token = torch.arange(16, dtype=torch.int32, device=DEVICE).view(4, 4) * 10
    per_token[0, 1], per_token[0, 3] = -1, -4
    table = torch.arange(num_tables * width, dtype=torch.int32, device=DEVICE) + 1
    lists = torch.arange(num_list, dtype=torch.int32, device=DEVICE) + 7
    made = []
    for stage in (stage_decode, stage_decode_triton):
        into = StagedStep(
            poisoned(4, 6, dtype=torch.int32),
            poisoned(5, 320, dtype=torch.int32),
            poisoned(num_list, dtype=torch.int32),
        )
        stage(per_token, table.view(num_tables, width), lists, ints(*SAMPLED), into)
        made.append(into)
    reference, ours = made
    assert torch.equal(ours.per_token, reference.per_token)
    assert ours.per_token[0, :4].tolist() == [0, 70, 20, 73]
    assert torch.equal(ours.table, reference.table)
    assert torch.equal(ours.lists, reference.lists)
    assert (ours.table[num_tables:] == torch.iinfo(torch.int32).min).all()
