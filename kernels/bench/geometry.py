"""The model that the figures are of, Llama-3.1-8B in bf16, its KV arena, and attention in fp32."""

from dataclasses import dataclass
from typing import Final

import torch

from baton.common.errors import ConfigError
from baton.kernels.bench.harness import fill_normal_

HIDDEN: Final = 4096
NUM_HEADS: Final = 32
NUM_KV_HEADS: Final = 8
HEAD_DIM: Final = 128
FFN: Final = 14336
VOCAB: Final = 128256
NUM_LAYERS: Final = 32
BLOCK_SIZE: Final = 32
QKV_WIDTH: Final = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
SCALE: Final = HEAD_DIM**-0.5
# Of one token in one layer, K and V in bf16.
KV_BYTES: Final = 2 * NUM_KV_HEADS * HEAD_DIM * 2
SLOT_BYTES: Final = NUM_LAYERS * BLOCK_SIZE * KV_BYTES


def make_arena(num_slots: int, device: torch.device) -> torch.Tensor:
    """`[slots, K, layers, 2, block_size, D]` in bf16, full of normal numbers."""
    shape = (num_slots, NUM_KV_HEADS, NUM_LAYERS, 2, BLOCK_SIZE, HEAD_DIM)
    return fill_normal_(torch.empty(shape, dtype=torch.bfloat16, device=device))


@dataclass(frozen=True)
class Tables:
    """Contexts and their slots, anywhere in the arena and none twice."""

    context_lens: list[int]
    # int32 `[S, N]`, padded with 0; `slots[s]` are those of row s on the host.
    block_table: torch.Tensor
    slots: list[list[int]]

    @property
    def kv_bytes(self) -> int:
        """What one layer reads."""
        return sum(self.context_lens) * KV_BYTES


def make_tables(context_lens: list[int], num_slots: int, device: torch.device) -> Tables:
    """ConfigError when the arena is too small."""
    counts = [-(-context // BLOCK_SIZE) for context in context_lens]
    if sum(counts) > num_slots:
        raise ConfigError(
            f"the figure needs {sum(counts)} blocks of {SLOT_BYTES >> 20} MiB and {num_slots} fit "
            "in the device's free memory; end what else runs there, or choose others with --only"
        )
    drawn = iter(torch.randperm(num_slots).tolist())
    slots = [[next(drawn) for _ in range(count)] for count in counts]
    table = torch.zeros(len(slots), max(counts), dtype=torch.int32)
    for row, of_row in zip(table, slots, strict=True):
        row[: len(of_row)] = torch.tensor(of_row, dtype=torch.int32)
    return Tables(context_lens, table.to(device), slots)


def gather_kv(arena: torch.Tensor, layer: int, slots: list[int]) -> torch.Tensor:
    """K and V of a row as `[2, K, tokens, D]`, one block after the other."""
    blocks = torch.stack([arena[slot, :, layer] for slot in slots])
    return blocks.permute(2, 1, 0, 3, 4).reshape(2, NUM_KV_HEADS, -1, HEAD_DIM)


def exact_attention(
    q_QHD: torch.Tensor, kv: torch.Tensor, first_position: int, context_len: int
) -> torch.Tensor:
    """fp32 `[Q, H, D]` for neighbouring queries from `first_position` on, causal."""
    k, v = kv[:, :, :context_len].float().repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1)
    scores = torch.bmm(q_QHD.float().transpose(0, 1), k.transpose(1, 2)) * SCALE
    position = torch.arange(context_len, device=kv.device)
    query = first_position + torch.arange(len(q_QHD), device=kv.device)
    scores.masked_fill_(position > query[:, None], -torch.inf)
    return torch.bmm(scores.softmax(-1), v).transpose(0, 1)
