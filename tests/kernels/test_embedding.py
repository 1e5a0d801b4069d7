"""Rows of the table, bit for bit."""

import pytest
import torch
from support.kernel_checks import DEVICE, DTYPES, needs_triton, normal, poisoned

from baton.kernels.embedding import embedding, embedding_triton


@needs_triton
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 20, 4096, 5000])
def test_kernel_equals_reference(width: int, dtype: torch.dtype, ids: torch.dtype) -> None:
    table = normal(11, width, dtype=dtype)
    token_ids = torch.tensor([10, 0, 3, 3, 9], dtype=ids, device=DEVICE)
    out = embedding_triton(token_ids, table, poisoned(5, width, dtype=dtype))
    assert torch.equal(out, embedding(token_ids, table))
    assert torch.equal(out, table[token_ids.long()])


@needs_triton
def test_no_tokens_are_no_work() -> None:
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert embedding_triton(none, normal(3, 8, dtype=torch.float32)).shape == (0, 8)


@needs_triton
def test_a_negative_id_is_a_row_of_zeros() -> None:
    """A sampler says -1 where no token is possible; what lies before the table is nobody's."""
    memory = normal(8, 20, dtype=torch.float32)
    table = memory[3:]
    token_ids = torch.tensor([2, -1, 0], device=DEVICE)
    out = embedding_triton(token_ids, table, poisoned(3, 20, dtype=torch.float32))
    assert torch.equal(out, embedding(token_ids, table))
    assert not out[1].any()
    assert torch.equal(out[0], table[2])
