"""The dispatcher as the fronts' TokenSource: one unread buffer and one reader per request.

A client that reads too slowly has its request cancelled, so that its unread tokens stay few and
workers do not decode for nobody.
"""

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Final

from baton.common.clock import Clock
from baton.common.errors import BatonError, SlowReader
from baton.common.failpoints import reach
from baton.common.ids import TransferId
from baton.common.timing import Timing
from baton.router.dispatch import Dispatch
from baton.router.generation import GenerationSpec, TokenEvent
from baton.router.journal import JournalEntry

MAX_UNREAD_TOKENS: Final = 16_384


@dataclass(slots=True, eq=False)
class _Unread:
    """Tokens that the client has not taken yet coalesce; four bytes each.

    `waits_since`: when the oldest of them came, in monotonic seconds; None without tokens.
    """

    entry: JournalEntry
    tokens: "array[int]" = field(default_factory=lambda: array("I"))
    waits_since: float | None = None
    end: TokenEvent | BatonError | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, tokens: list[int], now: float) -> None:
        if self.waits_since is None:
            self.waits_since = now
        self.tokens.extend(tokens)

    def take(self) -> list[int]:
        tokens, self.tokens = self.tokens.tolist(), array("I")
        self.waits_since = None
        return tokens


class DispatchStream:
    """Implements `Stream` over the dispatcher."""

    def __init__(self, source: "DispatchSource", unread: _Unread) -> None:
        self._source = source
        self._unread = unread

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        unread = self._unread
        while True:
            await unread.changed.wait()
            unread.changed.clear()
            # What comes while the reader is busy waits for the next round, its end included.
            tokens, end = unread.take(), unread.end
            if isinstance(end, TokenEvent):
                yield TokenEvent(tokens + end.token_ids, end.finish, end.usage, end.report)
                return
            if tokens:
                yield TokenEvent(tokens, None, None, None)
            if isinstance(end, BatonError):
                raise end

    async def finish_early(self) -> TokenEvent:
        return self._source.finish_early(self._unread.entry)

    async def aclose(self) -> None:
        self._source.cancel(self._unread.entry)


class DispatchSource:
    """Implements `TokenSource`; used on the event loop only."""

    def __init__(
        self,
        dispatch: Dispatch,
        flush: Callable[[], None],
        *,
        clock: Clock,
        timing: Timing,
    ) -> None:
        self._dispatch = dispatch
        self._flush = flush
        self._clock = clock
        self._slow_after_s = timing.slow_client_s
        self._unread: dict[TransferId, _Unread] = {}

    def submit(self, spec: GenerationSpec) -> DispatchStream:
        entry = self._dispatch.submit(spec)
        unread = self._unread[entry.transfer_id] = _Unread(entry)
        self._flush()
        reach("r.after_submit")
        return DispatchStream(self, unread)

    def finish_early(self, entry: JournalEntry) -> TokenEvent:
        self._unread.pop(entry.transfer_id, None)
        event = self._dispatch.finish_early(entry)
        self._flush()
        return event

    def cancel(self, entry: JournalEntry) -> None:
        self._unread.pop(entry.transfer_id, None)
        self._dispatch.cancel(entry)
        self._flush()

    def deliver(self, request: TransferId, event: TokenEvent | BatonError) -> None:
        """Put an event of the dispatcher before the request's reader."""
        unread = self._unread.get(request)
        if unread is None:
            return
        if isinstance(event, TokenEvent) and event.finish is None:
            unread.put(event.token_ids, self._clock.monotonic())
        else:
            unread.end = event
            del self._unread[request]
        unread.changed.set()

    def sweep(self) -> None:
        """End the requests whose clients do not read: called now and then, before a flush."""
        now = self._clock.monotonic()
        for unread in list(self._unread.values()):
            waits_since = unread.waits_since
            if waits_since is None:
                continue
            waited = now - waits_since
            if len(unread.tokens) > MAX_UNREAD_TOKENS or waited >= self._slow_after_s:
                error = SlowReader(
                    f"the client left {len(unread.tokens)} tokens unread, the first of them for "
                    f"{waited:.1f} s; the request was cancelled"
                )
                # The answer is broken off: what nobody reads is not kept for the error's sake.
                unread.take()
                self._dispatch.give_up_slow(unread.entry, error)
