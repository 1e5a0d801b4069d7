"""What all attention kernels over the paged arena take for granted of their arguments."""

import torch


def check_attention_arguments(
    q: torch.Tensor,
    arena: torch.Tensor,
    block_table_SN: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    lse_out: torch.Tensor | None,
) -> None:
    """Assert it. `q` and `out` are `[tokens, H, D]`, `lse_out` is `[tokens, H]`."""
    assert q.stride()[1:] == (q.shape[2], 1), "a token's heads follow each other"
    assert q.dtype == arena.dtype, "products are of one dtype"
    assert arena.is_contiguous(), "places are counted"
    assert out.is_contiguous(), "tokens follow each other"
    assert out.shape == q.shape, "a result for each query"
    assert block_table_SN.dtype == torch.int32, "slots are int32 on the device"
    assert block_table_SN.stride(1) == 1, "a row's slots follow each other"
    assert scale > 0, "the largest score stays the largest"
    if lse_out is not None:
        assert lse_out.is_contiguous(), "tokens follow each other"
        assert lse_out.shape == q.shape[:2], "a number for each query and head"
        assert lse_out.dtype == torch.float32, "lse is fp32"
