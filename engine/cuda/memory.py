"""What of a GPU's memory the KV arena gets: all that is free once the rest has its share.

| weights | workspace of the largest step | arena ................ | graphs, modules, others |
"""

from typing import Final

import torch

from baton.common.errors import ConfigError
from baton.engine.arena import Arena, ArenaLayout
from baton.engine.cuda.inputs import Planner, StepInputs
from baton.engine.cuda.model import CudaModel
from baton.kernels.sampling import SamplingRows, sample_triton

# For graphs, kernels that are loaded later, and what a fabric allocates.
RESERVED_BYTES: Final = 3 << 30
# What a process takes of a GPU before it allocates anything.
CONTEXT_BYTES: Final = 600 << 20


@torch.inference_mode()
def measure_workspace(
    model: CudaModel,
    planner: Planner,
    layout: ArenaLayout,
    *,
    max_rows: int,
    max_tokens: int,
) -> None:
    """Run the largest steps once, over an arena of nothing: the allocator keeps what they took.

    `max_tokens` of one prompt, and `max_rows` draws.
    """
    device = model.device
    # What loading left behind.
    torch.cuda.empty_cache()
    arena = torch.zeros((1, *layout.block_shape), dtype=layout.dtype, device=device)
    ints = torch.zeros(max_tokens, dtype=torch.int32, device=device)
    blocks = -(-max_tokens // layout.block_size)
    step = StepInputs(
        token_ids=ints,
        positions=torch.arange(max_tokens, dtype=torch.int32, device=device),
        # Nothing is written.
        slots=ints - 1,
        offsets=ints,
        num_decode=0,
        decode_table=ints[:0].view(0, 0),
        decode_works={},
        prefill_table=torch.zeros(1, blocks, dtype=torch.int32, device=device),
        prefill_works=planner.prefill([(max_tokens, max_tokens)]),
        last=torch.zeros(min(max_rows, max_tokens), dtype=torch.int32, device=device),
    )
    logits = model.forward(step, arena)
    assert logits is not None, "tokens are sampled"
    num_rows = len(logits)
    floats = torch.ones(num_rows, device=device)
    rows = SamplingRows(
        temperature=floats, top_k=ints[:num_rows].contiguous(), top_p=floats * 0.9,
        min_p=floats * 0, seed=torch.zeros(num_rows, dtype=torch.int64, device=device),
        position=ints[:num_rows].contiguous(), choice=ints[:num_rows].contiguous(),
    )  # fmt: skip
    sample_triton(logits, rows)
    torch.cuda.synchronize(device)


def free_for_arena(device: torch.device, block_bytes: int, share: float) -> int:
    """Bytes that the arena may take, its scratch block left out: of what is free, and of `share` of
    all memory what this process does not hold yet. Raises ConfigError when it is not one block."""
    free, total = torch.cuda.mem_get_info(device)
    of_share = int(share * total) - torch.cuda.memory_reserved(device) - CONTEXT_BYTES
    left = min(free, of_share) - RESERVED_BYTES - block_bytes
    if left < block_bytes:
        raise ConfigError(
            f"{device} has {free >> 20} of {total >> 20} MiB free, and this worker may use "
            f"{share:.0%} of them: weights, workspace and {RESERVED_BYTES >> 20} MiB that are kept "
            f"back leave no room for KV blocks of {block_bytes} bytes; end what else runs there, "
            "or share it with --gpu-memory-share or --kv-memory for each worker",
            field="gpu_memory_share",
        )
    return left


def require_plain_memory(arena: Arena) -> None:
    """The fabric opens the arena in other processes, which memory of expandable segments forbids.

    Raises ConfigError.
    """
    for segment in torch.cuda.memory_snapshot():
        start = segment["address"]
        if start <= arena.base_address < start + segment["total_size"]:
            if segment.get("is_expandable", False):
                raise ConfigError(
                    "PYTORCH_CUDA_ALLOC_CONF has expandable_segments:True, and such memory cannot "
                    "be read by other processes over NVLink; unset it"
                )
            return
    raise AssertionError("the arena lies in no segment of the allocator")
