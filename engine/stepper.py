"""The seam between the engine and what runs its steps, and its implementation for a host.

    engine thread   launch(chunks) -> ticket        poll() ... True -> result(): the sampled tokens

Steps run one after the other in the order of launch, forward and sampling of each. A step may be
launched while the one before it runs: what that one will have sampled is a promise, which the
device keeps by itself.
"""

from collections.abc import Sequence as Ordered
from typing import Final, Protocol

from baton.engine.device import Device, Ticket
from baton.engine.runner import Runner
from baton.engine.sampler import Draw, Sampler
from baton.engine.sequence import Chunk


class Stepper(Protocol):
    """Runs steps over one arena. Engine thread only."""

    @property
    def replayed(self) -> bool | None:
        """Whether the step launched last replays a CUDA graph; None where there are none."""
        ...

    def launch(self, chunks: Ordered[Chunk]) -> Ticket[list[int]]:
        """Queue the step that forwards `chunks`, at least one, each of another sequence.

        Its ticket gives one token for each chunk that is last, in order. The sequences are read
        before this returns, and nothing of them is changed.
        """
        ...

    def close(self) -> None:
        """Take no more steps; afterwards none is running. Idempotent."""
        ...


class HostStepper:
    """A runner of the host and the sampler, as one work per step of a device."""

    replayed: Final = None

    def __init__(self, runner: Runner, sampler: Sampler, device: Device) -> None:
        self._runner = runner
        self._sampler = sampler
        self._device = device
        self._last: Ticket[list[int]] | None = None

    def launch(self, chunks: Ordered[Chunk]) -> Ticket[list[int]]:
        forward = self._runner.prepare(chunks)
        draws = [Draw.of(chunk.sequence) for chunk in chunks if chunk.is_last]
        before = None
        if any(chunk.promise is not None for chunk in chunks):
            before = self._last
            assert before is not None, "a promise is made by the step before"

        def run() -> list[int]:
            # Works run in order: the step before has ended, well or not.
            sampled = [] if before is None else before.result()
            return self._sampler.sample(forward(sampled), draws)

        self._last = self._device.submit(run)
        return self._last

    def close(self) -> None:
        self._device.close()
