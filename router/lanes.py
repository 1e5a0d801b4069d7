"""What waits to be written to one worker, in two lanes: what is urgent goes before submits.

An urgent message waits for at most one frame of a submit. All that was not written outlives a
broken stream, so that no submit is lost that the worker never saw.
"""

import asyncio
from collections import deque
from typing import Final

from baton.common.clock import Clock
from baton.common.control_codec import router_message_to_pb
from baton.common.errors import QueueFull
from baton.common.frames import OutgoingSubmit
from baton.common.ids import RequestKey
from baton.common.messages import Cancel, RouterMessage, Submit
from baton.v1 import worker_pb2 as pb

MAX_URGENT: Final = 16_384
MAX_SUBMITS: Final = 4_096
MAX_SUBMIT_BYTES: Final = 256 * 1024 * 1024


class Lanes:
    """Used on the event loop only; one writer at a time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._urgent: deque[RouterMessage] = deque()
        self._submits: dict[RequestKey, OutgoingSubmit] = {}
        self._submit_bytes = 0
        # Taken by the writer and not known to be written.
        self._in_hand: RouterMessage | None = None
        self._changed = asyncio.Event()

    @property
    def unsent_submits(self) -> frozenset[RequestKey]:
        """Requests that the worker cannot know yet: not all of their submit was framed."""
        return frozenset(self._submits)

    def put(self, message: RouterMessage) -> None:
        """Queue a message. Raises QueueFull when its lane is full."""
        if isinstance(message, Submit):
            self._put_submit(message)
        elif isinstance(message, Cancel) and self._withdraw(message.key):
            return
        else:
            if len(self._urgent) >= MAX_URGENT:
                raise QueueFull(f"{MAX_URGENT} messages wait for the worker")
            self._urgent.append(message)
        self._changed.set()

    async def next_frame(self) -> pb.AttachRequest:
        """The frame to write now; `written` is to be called after it, or `rewind`."""
        assert self._in_hand is None, "the frame before was written"
        while not self._urgent and not self._submits:
            self._changed.clear()
            await self._changed.wait()
        if self._urgent:
            self._in_hand = self._urgent.popleft()
            return router_message_to_pb(self._in_hand)
        submit = next(iter(self._submits.values()))
        frame = submit.next_frame(self._clock.monotonic())
        if submit.is_done:
            # From here on the worker may know it: the next hello names it, and a worker that does
            # not says so. Sending it again could revive what that worker has ended.
            self._remove(submit)
        return frame

    def written(self) -> None:
        """gRPC took the frame."""
        self._in_hand = None

    def rewind(self) -> None:
        """A new stream begins: urgent messages may come twice, begun submits begin anew."""
        if self._in_hand is not None:
            self._urgent.appendleft(self._in_hand)
            self._in_hand = None
        for submit in self._submits.values():
            if submit.is_begun:
                submit.rewind()

    def clear(self) -> None:
        """The worker is gone for its requests, and nothing of this concerns anybody."""
        self._urgent.clear()
        self._submits.clear()
        self._submit_bytes = 0
        self._in_hand = None

    def _put_submit(self, submit: Submit) -> None:
        outgoing = OutgoingSubmit(submit, now=self._clock.monotonic())
        is_full = len(self._submits) >= MAX_SUBMITS or (
            # One that is larger than the bound still finds its turn.
            self._submits and self._submit_bytes + outgoing.num_bytes > MAX_SUBMIT_BYTES
        )
        if is_full:
            raise QueueFull(f"{len(self._submits)} submits wait for the worker", retry_after_s=1.0)
        assert submit.key not in self._submits, "an attempt is submitted once"
        self._submits[submit.key] = outgoing
        self._submit_bytes += outgoing.num_bytes

    def _withdraw(self, key: RequestKey) -> bool:
        """Whether the submit of this request waited here and nothing of it was sent."""
        submit = self._submits.get(key)
        if submit is None:
            return False
        self._remove(submit)
        # With some of its parts sent, the worker hears of the cancel and drops them.
        return not submit.is_begun

    def _remove(self, submit: OutgoingSubmit) -> None:
        del self._submits[submit.key]
        self._submit_bytes -= submit.num_bytes
