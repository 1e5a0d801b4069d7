"""Which queries each program of a prefill attends for, worked out once for all layers.

Legend: S rows, T tokens, Q queries of a row, C its context.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Queries of a tile.
BLOCK_M = 128


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """Tiles of up to `block_m` queries of one row, most keys first, for every head.

    All tensors are int32 views of one on the device. A tile is
    (row of the batch, its first token in q `[T, H, D]`, its queries, position of the first query,
    end of the context needed = position of the last query + 1, first token seen by any query).
    """

    # `[num_tiles, 6]`
    tiles: torch.Tensor
    # `[S + 1]`, `[S]`, `[S]`
    cu_query_lens: torch.Tensor
    query_lens: torch.Tensor
    context_lens: torch.Tensor
    block_m: int
    window: int | None


def plan_prefill_work(
    query_lens: Sequence[int] | torch.Tensor,
    context_lens: Sequence[int] | torch.Tensor,
    block_m: int = BLOCK_M,
    *,
    device: torch.device,
    window: int | None = None,
) -> PrefillWork:
    """The work of a step, from lengths `[S]` on the host; a row without queries has no tile.

    One copy to the device, which the host does not wait for.
    """
    query_S = np.asarray(query_lens, dtype=np.int64)
    context_S = np.asarray(context_lens, dtype=np.int64)
    assert (query_S <= context_S).all(), "queries are the last tokens of their context"
    num_S = -(-query_S // block_m)
    cu_query = np.concatenate([[0], np.cumsum(query_S)])
    row = np.repeat(np.arange(len(query_S)), num_S)
    start = (np.arange(len(row)) - np.repeat(np.cumsum(num_S) - num_S, num_S)) * block_m
    num_queries = np.minimum(query_S[row] - start, block_m)
    position = context_S[row] - query_S[row] + start
    end = position + num_queries
    first = np.maximum(position - window + 1, 0) if window is not None else np.zeros_like(end)
    most_first = np.argsort(first - end, kind="stable")
    tiles = np.stack([row, cu_query[row] + start, num_queries, position, end, first], axis=1)
    parts = [tiles[most_first].reshape(-1), cu_query, query_S, context_S]
    on_host = torch.from_numpy(np.concatenate(parts).astype(np.int32))
    if device.type == "cuda":
        on_host = on_host.pin_memory()
    on_device = on_host.to(device, non_blocking=True)
    tiles, cu_query_lens, queries, contexts = on_device.split([len(part) for part in parts])
    return PrefillWork(tiles.view(-1, 6), cu_query_lens, queries, contexts, block_m, window)
