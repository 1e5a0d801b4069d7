"""Decode steps as CUDA graphs: captured once per size, replayed with other numbers.

A graph is of a number of rows, padded, and of room for the work of its attention:

    rows only     each row is one program per KV head, nothing is merged
    items, rows   rows are cut into at most so many items, and merged

What differs from step to step lies in static buffers: tokens, positions, places, block tables and
the lists of work. All graphs share one memory pool, since one runs at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from baton.engine.cuda.inputs import DecodeWorks, ListedWorks, Planner, StepInputs, Unpacked
from baton.engine.cuda.layout import PADDING_SLOT, Int32s
from baton.engine.cuda.model import CudaModel
from baton.kernels.decode_work import decode_work_bound, pack_lists, reserve_decode_work
from baton.kernels.step_inputs import PER_TOKEN, StagedStep, stage_decode_triton

# Up to 64 rows a step reads weights alone, whatever their number; behind that tensor cores count.
SIZES = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
SIZE_STEP = 64
# The least room for items, and how it grows from graph to graph: programs in vain cost their start.
MIN_ITEMS = 16
ITEM_FACTOR = 2
WARM_UPS = 2

# How many of how many are captured.
Progress = Callable[[int, int], None]
# A graph and the logits that its replay leaves.
Captured = tuple[torch.cuda.CUDAGraph, torch.Tensor]


@dataclass(frozen=True, slots=True)
class GraphSize:
    """Rows, and room for items and merges of each window's attention."""

    num_rows: int
    num_items: int
    num_merges: int


def row_sizes(max_rows: int) -> list[int]:
    """Numbers of rows to capture, the last of them `max_rows`."""
    sizes = [size for size in SIZES if size < max_rows]
    sizes += range(SIZES[-1] + SIZE_STEP, max_rows, SIZE_STEP)
    return [*sizes, max_rows]


def graph_sizes(
    max_rows: int, max_tokens: int, num_kv_heads: int, *, windowed: bool
) -> list[GraphSize]:
    """All graphs for up to `max_rows` rows that see `max_tokens` tokens together."""
    sizes = []
    for rows in row_sizes(max_rows):
        sizes.append(GraphSize(rows, rows, 0))
        # What bounds a window's work as well: it cuts a row once more.
        window = 1 if windowed else None
        bound = decode_work_bound(rows, max_tokens, num_kv_heads, window=window)[0]
        items = max(MIN_ITEMS, rows)
        while items < bound:
            sizes.append(GraphSize(rows, items, rows))
            items *= ITEM_FACTOR
        sizes.append(GraphSize(rows, bound, rows))
    return sizes


def smallest_fit(
    sizes: Sequence[GraphSize], num_rows: int, listed: ListedWorks
) -> GraphSize | None:
    """Of `sizes` as `graph_sizes` lists them, the first with room for a step of decode rows.

    None for more rows than there are graphs of, and for rows that see more tokens than the arena
    holds, since they share blocks: unless each row is one item, they may be more than there is room
    for.
    """
    items = max(work.num_items for work in listed.values())
    merges = max(work.num_merges for work in listed.values())
    for size in sizes:
        if size.num_rows >= num_rows and size.num_items >= items and size.num_merges >= merges:
            return size
    return None


class DecodeGraphs:
    """Graphs of one model over one arena, all captured at the start.

    `max_tokens` bounds what the rows of a step see together: the tokens of the arena.
    """

    def __init__(
        self,
        model: CudaModel,
        arena: torch.Tensor,
        planner: Planner,
        *,
        max_rows: int,
        max_tokens: int,
        stream: torch.cuda.Stream,
        progress: Progress | None = None,
    ) -> None:
        config, device = model.config, model.device
        self._model, self._arena, self._planner, self._stream = model, arena, planner, stream
        blocks_per_row = -(-config.max_model_len // arena.shape[4])
        self._per_token = torch.zeros(PER_TOKEN, max_rows, dtype=torch.int32, device=device)
        self._per_token[2] = PADDING_SLOT
        self._table = torch.zeros(max_rows, blocks_per_row, dtype=torch.int32, device=device)
        # Those of all windows, one behind the other.
        self._lists: dict[GraphSize, torch.Tensor] = {}
        windowed = planner.windows != [None]
        sizes = graph_sizes(max_rows, max_tokens, config.num_kv_heads, windowed=windowed)
        self._whole = self._reserve(max(sizes, key=lambda size: size.num_items))
        self._graphs = self._capture_all(sizes, progress)
        self._sizes = sizes

    def fit(self, num_rows: int, listed: ListedWorks) -> GraphSize | None:
        """The smallest graph with room for a step of decode rows; None when there is none."""
        return smallest_fit(self._sizes, num_rows, listed)

    def lists(self, size: GraphSize, listed: ListedWorks) -> list[Int32s]:
        """As the graph reads them."""
        return [pack_lists(each, size.num_items, size.num_merges) for each in listed.values()]

    def replay(self, size: GraphSize, unpacked: Unpacked, before: torch.Tensor) -> torch.Tensor:
        """Logits `[rows, vocab]` of the step, valid until the next replay. `before` are the tokens
        of the step before. The step was laid out for the graph's rows and lists."""
        staged = StagedStep(self._per_token, self._table, self._lists[size])
        assert unpacked.per_token.shape[1] == size.num_rows, "padded to the graph's rows"
        stage_decode_triton(
            unpacked.per_token, unpacked.decode_table, unpacked.lists, before, staged
        )
        graph, logits = self._graphs[size]
        graph.replay()
        return logits

    def _reserve(self, size: GraphSize) -> DecodeWorks:
        config = self._model.config
        return {
            window: reserve_decode_work(
                size.num_items, size.num_merges, size.num_items, config.num_heads,
                config.head_dim, device=self._model.device, window=window,
            )
            for window in self._planner.windows
        }  # fmt: skip

    def _works_of(self, size: GraphSize) -> DecodeWorks:
        """Over lists of its own, and pieces that all graphs share."""
        lists = self._lists[size].view(len(self._whole), -1, 4)
        return {
            window: replace(
                whole, lists=of_window, num_items=size.num_items, num_merges=size.num_merges
            )
            for of_window, (window, whole) in zip(lists, self._whole.items(), strict=True)
        }

    def _inputs(self, size: GraphSize) -> StepInputs:
        rows = size.num_rows
        token_ids, positions, slots, offsets = self._per_token[:, :rows].unbind()
        return StepInputs(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            offsets=offsets,
            num_decode=rows,
            decode_table=self._table[:rows],
            decode_works=self._works_of(size),
            prefill_table=self._table[:0],
            prefill_works={},
            last=None,
        )

    @torch.inference_mode()
    def _capture_all(
        self, sizes: Sequence[GraphSize], progress: Progress | None
    ) -> dict[GraphSize, Captured]:
        """Largest first, so that the others fit into the memory that it took."""
        pool = torch.cuda.graph_pool_handle()
        order = sorted(sizes, key=lambda size: (size.num_rows, size.num_items), reverse=True)
        captured = {}
        for nth, size in enumerate(order):
            entries = len(self._whole) * (1 + size.num_items + size.num_merges)
            self._lists[size] = torch.zeros(
                4 * entries, dtype=torch.int32, device=self._model.device
            )
            captured[size] = self._capture(size, pool, warm_ups=WARM_UPS if nth == 0 else 1)
            if progress is not None:
                progress(nth + 1, len(order))
        return captured

    def _capture(self, size: GraphSize, pool: Any, *, warm_ups: int) -> Captured:
        step = self._inputs(size)
        # Kernels compile and libraries set themselves up outside of the capture.
        for _ in range(warm_ups):
            self._forward(step)
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`, which gives the workspace of large steps back each time.
        graph.capture_begin(pool=pool)
        logits = self._forward(step)
        graph.capture_end()
        return graph, logits

    def _forward(self, step: StepInputs) -> torch.Tensor:
        logits = self._model.forward(step, self._arena)
        assert logits is not None, "each row of a decode step is sampled"
        return logits
