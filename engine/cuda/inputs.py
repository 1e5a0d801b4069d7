"""What a forward reads beside weights and KV: a layout's numbers as tensors of the device."""

from collections.abc import Sequence as Ordered
from dataclasses import dataclass

import torch

from baton.engine.arena import ArenaLayout
from baton.engine.cuda.layout import PER_DRAW, Int32s, Layout
from baton.engine.model_config import ModelConfig
from baton.kernels.decode_work import (
    DecodeWork,
    ListedWork,
    list_decode_work,
    pack_lists,
    work_over,
)
from baton.kernels.prefill_work import PrefillWork, plan_prefill_work
from baton.kernels.sampling import SamplingRows
from baton.kernels.step_inputs import PER_TOKEN

# By sliding window; None is none.
DecodeWorks = dict[int | None, DecodeWork]
ListedWorks = dict[int | None, ListedWork]
PrefillWorks = dict[int | None, PrefillWork]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step; T tokens of which the first `num_decode` are rows of one token. int32."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    offsets: torch.Tensor
    num_decode: int
    decode_table: torch.Tensor
    decode_works: DecodeWorks
    prefill_table: torch.Tensor
    prefill_works: PrefillWorks
    # Tokens after which the next one is sampled; None: all of them.
    last: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A layout's sections on the device."""

    draws: torch.Tensor
    per_token: torch.Tensor
    decode_table: torch.Tensor
    prefill_table: torch.Tensor
    last: torch.Tensor
    # Of each sliding window, one behind the other; `lists` is all of them.
    lists: torch.Tensor
    list_sizes: Ordered[int]

    @classmethod
    def of(cls, layout: Layout, words: torch.Tensor) -> "Unpacked":
        """`words` are the layout's, on the device."""
        parts = words.split(layout.sizes)
        return cls(
            parts[0].view(PER_DRAW, layout.num_last),
            parts[1].view(PER_TOKEN, layout.num_rows),
            parts[2].view(layout.num_decode, layout.decode_width),
            parts[3].view(len(layout.prefill_lens), layout.prefill_width),
            parts[4],
            parts[5],
            layout.list_sizes,
        )

    def sampling_rows(self) -> SamplingRows:
        draws = self.draws
        floats = draws[3:6].view(torch.float32)
        return SamplingRows(
            seed=draws[:2].view(-1).view(torch.int64),
            position=draws[2],
            temperature=floats[0],
            top_p=floats[1],
            min_p=floats[2],
            top_k=draws[6],
            choice=draws[7],
        )


@dataclass(frozen=True, slots=True)
class Planner:
    """Works out for a step which program attends to what, once for all layers of a window."""

    config: ModelConfig
    device: torch.device

    @property
    def windows(self) -> list[int | None]:
        return list(dict.fromkeys(self.config.sliding_window))

    def list_decode(self, context_lens: Ordered[int]) -> ListedWorks:
        """On the host alone; nothing where there are no rows."""
        if not context_lens:
            return {}
        return {
            window: list_decode_work(context_lens, self.config.num_kv_heads, window=window)
            for window in self.windows
        }

    def decode(self, listed: ListedWorks, unpacked: Unpacked) -> DecodeWorks:
        """Over the lists that came with the step."""
        lists = unpacked.lists.split(list(unpacked.list_sizes))
        return {
            window: work_over(
                of_window.view(-1, 4), each, self.config.num_heads, self.config.head_dim
            )
            for of_window, (window, each) in zip(lists, listed.items(), strict=True)
        }

    def prefill(self, lens: Ordered[tuple[int, int]]) -> PrefillWorks:
        if not lens:
            return {}
        query_lens, context_lens = zip(*lens, strict=True)
        return {
            window: plan_prefill_work(query_lens, context_lens, device=self.device, window=window)
            for window in self.windows
        }


def packed_lists(listed: ListedWorks) -> list[Int32s]:
    """As they cross, without room for more."""
    return [pack_lists(each, each.num_items, each.num_merges) for each in listed.values()]


def clear_tails(arena: torch.Tensor, layout: Layout) -> None:
    """Zero what lies behind each prefilled context in its last block.

    The prefill kernel weighs it with 0, and 0 times a leftover NaN or infinity is NaN.
    """
    for slot, filled in layout.tails:
        arena[slot, :, :, :, filled:].zero_()


def check_arena(layout: ArenaLayout, config: ModelConfig) -> None:
    """The arena must have the model's layout."""
    of_model = (config.num_kv_heads, config.num_layers, config.head_dim, config.torch_dtype)
    of_arena = (layout.num_kv_heads, layout.num_layers, layout.head_dim, layout.dtype)
    assert of_model == of_arena, f"arena {of_arena}, model {of_model}"
