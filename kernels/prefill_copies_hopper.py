"""The producer warp of `prefill_attention_hopper`: which tiles a program takes, in which order, and
their copies from the paged arena into shared memory.

A key tile of 128 tokens is put together from blocks of the arena; a box is `[block_size, 64]`, one
block's tokens by half of a head of 128. Of each row of barriers the first half says full, the
second empty.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def num_turns(num_items, num_programs):
    """Items of this program; each has one at least."""
    rounds = (num_items + num_programs - 1) // num_programs
    has_last = item_of_turn(rounds - 1, num_programs) < num_items
    return rounds - 1 + has_last.to(gl.int32)


@gluon.jit
def item_of_turn(turn, num_programs):
    """Longest tiles first, dealt out back and forth: sums of work differ by less than a tile."""
    program = gl.program_id(0)
    forth = turn * num_programs + program
    back = (turn + 1) * num_programs - 1 - program
    return gl.where(turn % 2 == 0, forth, back)


@gluon.jit
def _load_key_tile(kv_desc, table, block, bounds, base_row, slot_rows, bar, buffer):
    """Issue the copies of BLOCK_N tokens into `buffer` `[BLOCK_N, D]`."""
    BLOCK_SIZE: gl.constexpr = kv_desc.block_type.shape[0]
    HALF: gl.constexpr = kv_desc.block_type.shape[1]
    PAGES: gl.constexpr = buffer.shape[0] // BLOCK_SIZE
    HALVES: gl.constexpr = buffer.shape[1] // HALF
    boxes = buffer._reinterpret(kv_desc.dtype, [HALVES * PAGES, BLOCK_SIZE, HALF], kv_desc.layout)
    mbarrier.expect(bar, buffer.shape[0] * buffer.shape[1] * 2)
    for page in gl.static_range(PAGES):
        # Behind the context its last block stands in, and before the window its first: the mask
        # hides both, and no other entry of the table is read.
        seen = gl.minimum(gl.maximum(block + page, bounds[0]), bounds[1])
        row = gl.load(table + seen) * slot_rows + base_row
        for half in gl.static_range(HALVES):
            box = boxes.index(half * PAGES + page)
            tma.async_copy_global_to_shared(kv_desc, [row, half * HALF], bar, box)


@gluon.jit
def produce(
    q_desc, kv_desc, shared, work, arena, NUM_HEADS: gl.constexpr, NUM_KV_HEADS: gl.constexpr
):  # fmt: skip
    q_smem, k_ring, v_ring, q_bars, k_bars, v_bars = shared
    tiles, num_items, num_programs = work
    tables, table_stride, layer, num_layers = arena
    STAGES: gl.constexpr = k_ring.shape[0]
    BLOCK_N: gl.constexpr = k_ring.shape[1]
    D: gl.constexpr = k_ring.shape[2]
    BLOCK_SIZE: gl.constexpr = kv_desc.block_type.shape[0]
    HALF: gl.constexpr = kv_desc.block_type.shape[1]
    slot_rows = num_layers * (NUM_KV_HEADS * 2 * BLOCK_SIZE)
    count = 0
    for turn in range(num_turns(num_items, num_programs)):
        item = item_of_turn(turn, num_programs)
        tile = tiles + (item // NUM_HEADS) * 6
        head = item % NUM_HEADS
        table = tables + gl.load(tile) * table_stride
        first_token = gl.load(tile + 1)
        end = gl.load(tile + 4)
        begin = gl.load(tile + 5)
        # Two buffers: the next item's queries come while this one's are in use.
        q_bar = q_bars.index(turn % 2)
        mbarrier.wait(q_bars.index(2 + turn % 2), ((turn // 2) & 1) ^ 1)
        mbarrier.expect(q_bar, 2 * 64 * D * 2)
        for group in gl.static_range(2):
            boxes = q_smem.index(turn % 2 * 2 + group)._reinterpret(
                q_desc.dtype, [D // HALF, 64, HALF], q_desc.layout
            )
            for half in gl.static_range(D // HALF):
                at = [first_token + group * 64, head * D + half * HALF]
                tma.async_copy_global_to_shared(q_desc, at, q_bar, boxes.index(half))
        kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
        k_row = (kv_head * num_layers + layer) * (2 * BLOCK_SIZE)
        bounds = (begin // BLOCK_SIZE, (end - 1) // BLOCK_SIZE)
        first_tile = begin // BLOCK_N
        num_tiles = (end + BLOCK_N - 1) // BLOCK_N - first_tile
        for j in range(num_tiles):
            block = (first_tile + num_tiles - 1 - j) * (BLOCK_N // BLOCK_SIZE)
            stage = count % STAGES
            phase = ((count // STAGES) & 1) ^ 1
            mbarrier.wait(k_bars.index(STAGES + stage), phase)
            _load_key_tile(
                kv_desc, table, block, bounds, k_row, slot_rows,
                k_bars.index(stage), k_ring.index(stage),
            )  # fmt: skip
            mbarrier.wait(v_bars.index(STAGES + stage), phase)
            _load_key_tile(
                kv_desc, table, block, bounds, k_row + BLOCK_SIZE, slot_rows,
                v_bars.index(stage), v_ring.index(stage),
            )  # fmt: skip
            count += 1
