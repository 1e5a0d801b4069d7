"""The way of a step's numbers to the device and of its tokens back, beside the stream of kernels.

    copies in    | n+1 |                       | n+2 |
    kernels      ... step n .......... | step n+1 ....... | ...
    copies out                         | tokens of n |

A copy in the stream of kernels would hold them up for as long as its start takes; two queues of
their own have it done by the time it is waited for. Each of the two steps in flight has its own
buffers: they are used again once its ticket was collected.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

NUM_STEPS: Final = 2
FIRST_CAPACITY: Final = 1 << 16


@dataclass(slots=True)
class _Buffers:
    pinned: torch.Tensor
    on_device: torch.Tensor


class Staging:
    """Buffers for two steps of at most `max_rows` sampled tokens each. Engine thread only."""

    def __init__(self, device: torch.device, kernels: torch.cuda.Stream, max_rows: int) -> None:
        self._device = device
        self._kernels = kernels
        self._copies_in = torch.cuda.Stream(device)
        self._copies_out = torch.cuda.Stream(device)
        self._buffers = [self._allocate(FIRST_CAPACITY) for _ in range(NUM_STEPS)]
        self._sampled = torch.zeros(NUM_STEPS, max_rows, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(NUM_STEPS, max_rows, dtype=torch.int32, pin_memory=True)
        self._step = 0

    @property
    def sampled(self) -> torch.Tensor:
        """`[max_rows]`: where the step that is launched now leaves what it samples."""
        return self._sampled[self._step % NUM_STEPS]

    @property
    def sampled_before(self) -> torch.Tensor:
        """`[max_rows]`: what the step before it samples, or has sampled."""
        return self._sampled[(self._step - 1) % NUM_STEPS]

    def upload(self, words: npt.NDArray[np.int32]) -> torch.Tensor:
        """The words on the device, to be read by kernels that are launched from now on."""
        count = len(words)
        buffers = self._buffers[self._step % NUM_STEPS]
        if count > len(buffers.pinned):
            buffers = self._allocate(2 * count)
            self._buffers[self._step % NUM_STEPS] = buffers
        buffers.pinned.numpy()[:count] = words
        arrived = buffers.on_device[:count]
        with torch.cuda.stream(self._copies_in):
            arrived.copy_(buffers.pinned[:count], non_blocking=True)
        self._kernels.wait_stream(self._copies_in)
        return arrived

    def download(self, num_sampled: int) -> tuple[torch.Tensor, torch.cuda.Event]:
        """The tokens of this step on the host, once the event has come: behind all that the step
        writes. The next step begins."""
        index = self._step % NUM_STEPS
        tokens = self._tokens[index, :num_sampled]
        self._copies_out.wait_stream(self._kernels)
        ended = torch.cuda.Event()
        with torch.cuda.stream(self._copies_out):
            tokens.copy_(self._sampled[index, :num_sampled], non_blocking=True)
            ended.record()
        self._step += 1
        return tokens, ended

    def _allocate(self, capacity: int) -> _Buffers:
        return _Buffers(
            torch.zeros(capacity, dtype=torch.int32, pin_memory=True),
            torch.zeros(capacity, dtype=torch.int32, device=self._device),
        )
