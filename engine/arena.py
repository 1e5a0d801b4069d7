"""The arena: one buffer with every block of a rank, and the generation word of each slot.

    arena  [slot][kv_head][layer][k|v][token][head_dim]      a slot is contiguous: one descriptor
    words  [slot]                                            uint64, raised before bytes may change

Heads are outermost in a slot, so that a tensor-parallel rank's share is one byte range. On the host
both lie in anonymous page-aligned memory, which a transport can register; an arena may also lie on
a CUDA device. The arena has one slot more than it
tells of: `scratch_slot`, read by padding in block tables and never handed out.
"""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import torch

from baton.common.errors import ConfigError
from baton.common.ids import Generation, Slot
from baton.common.randomness import Randomness

WORD_BYTES = 8
FIRST_GENERATION_BITS = 62


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaLayout:
    """The shape of one slot; `block_size` in tokens."""

    num_kv_heads: int
    num_layers: int
    block_size: int
    head_dim: int
    dtype: torch.dtype

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_kv_heads, self.num_layers, 2, self.block_size, self.head_dim)

    @property
    def block_bytes(self) -> int:
        return prod(self.block_shape) * self.dtype.itemsize


class Arena:
    """`num_slots` slots and the scratch slot, all bytes zero at first.

    `device` is "cpu" or "cuda[:ordinal]". The memory lives as long as this object or a tensor made
    from it. Raises `ConfigError` when the machine does not give that much, or has no such device.
    """

    def __init__(self, layout: ArenaLayout, num_slots: int, device: str = "cpu") -> None:
        assert num_slots > 0, "an arena without slots serves nobody"
        self.layout = layout
        self._num_slots = num_slots
        shape = (num_slots + 1, *layout.block_shape)
        if device == "cpu":
            self._tensor = _host_tensor(shape, layout.dtype)
        else:
            self._tensor = _cuda_tensor(shape, layout.dtype, device)
        assert self.base_address % WORD_BYTES == 0, "blocks are read as words"

    @property
    def tensor(self) -> torch.Tensor:
        """`[num_slots + 1, num_kv_heads, num_layers, 2, block_size, head_dim]`, contiguous."""
        return self._tensor

    @property
    def base_address(self) -> int:
        return self._tensor.data_ptr()

    @property
    def device(self) -> int | None:
        """The ordinal of the CUDA device that holds the bytes; None for host memory."""
        return self._tensor.get_device() if self._tensor.is_cuda else None

    @property
    def num_bytes(self) -> int:
        """All slots with the scratch slot."""
        return (self._num_slots + 1) * self.layout.block_bytes

    @property
    def num_slots(self) -> int:
        """Slots that may be handed out: `[0, num_slots)`."""
        return self._num_slots

    @property
    def scratch_slot(self) -> Slot:
        return Slot(self._num_slots)

    @property
    def block_bytes(self) -> int:
        return self.layout.block_bytes


class GenerationTable:
    """One word per slot that only ever increases, each started at its own random 62-bit number.

    Random starts make the words of two lives of a worker differ. A word is raised before anything
    that may change its slot's bytes is launched or posted; a reader that saw another value before
    and after its read must drop what it read.
    """

    def __init__(self, num_slots: int, randomness: Randomness) -> None:
        self._buffer = _anonymous_pages(num_slots * WORD_BYTES)
        self._words: npt.NDArray[np.uint64] = np.frombuffer(
            self._buffer, dtype=np.uint64, count=num_slots
        )
        drawn = randomness.bits(num_slots * 64).to_bytes(num_slots * WORD_BYTES, "little")
        mask = np.uint64((1 << FIRST_GENERATION_BITS) - 1)
        np.bitwise_and(np.frombuffer(drawn, dtype="<u8"), mask, out=self._words)

    @property
    def base_address(self) -> int:
        return int(self._words.ctypes.data)

    @property
    def num_bytes(self) -> int:
        return int(self._words.nbytes)

    def word(self, slot: Slot) -> Generation:
        return Generation(int(self._words[slot]))

    def words(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """The words of the slots, copied."""
        return self._words[slots]

    def raise_word(self, slot: Slot) -> Generation:
        """The slot's new generation."""
        self._words[slot] += np.uint64(1)
        return Generation(int(self._words[slot]))

    def raise_words(self, slots: Sequence[Slot]) -> None:
        """Raise each named slot's word, by one even when it is named twice."""
        if slots:
            self._words[np.asarray(slots, dtype=np.int64)] += np.uint64(1)


def _host_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros on pages of their own."""
    count = prod(shape)
    pages = _anonymous_pages(count * dtype.itemsize)
    tensor = torch.frombuffer(pages, dtype=dtype, count=count)
    assert tensor.data_ptr() % mmap.PAGESIZE == 0, "mmap gives whole pages"
    return tensor.view(shape)


def _cuda_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Zeros on a CUDA device, written before this returns."""
    try:
        place = torch.device(device)
        if place.type != "cuda":
            raise ConfigError(
                f"device is {device!r}; it must be cpu, cuda or cuda:<ordinal>",
                field="device",
            )
        tensor = torch.zeros(shape, dtype=dtype, device=place)
        torch.cuda.synchronize(place)
    # A device string that does not parse, no CUDA in this build, no such device, no memory.
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"cannot make an arena of {prod(shape) * dtype.itemsize} bytes on {device!r} "
            f"({error}); name a device that this machine has, or use fewer blocks",
            field="device",
        ) from error
    return tensor


def _anonymous_pages(num_bytes: int) -> mmap.mmap:
    """Zeroed private memory that starts on a page."""
    try:
        return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise ConfigError(
            f"cannot map {num_bytes} bytes of memory ({error}); use fewer blocks"
        ) from error
