"""The dispatcher as the fronts' TokenSource: one unread buffer and one reader per request."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from baton.common.errors import BatonError
from baton.common.ids import RequestKey
from baton.router.dispatch import Dispatch
from baton.router.generation import GenerationSpec, TokenEvent
from baton.router.journal import JournalEntry
from baton.router.placement import Candidate


@dataclass(slots=True, eq=False)
class _Unread:
    """Tokens that the client has not taken yet coalesce, so the buffer is bounded by max_tokens."""

    tokens: list[int] = field(default_factory=list)
    end: TokenEvent | BatonError | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class DispatchStream:
    """Implements `Stream` over the dispatcher."""

    def __init__(self, source: "DispatchSource", entry: JournalEntry, unread: _Unread) -> None:
        self._source = source
        self._entry = entry
        self._unread = unread

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        unread = self._unread
        while True:
            await unread.changed.wait()
            unread.changed.clear()
            tokens, unread.tokens = unread.tokens, []
            if isinstance(unread.end, TokenEvent):
                end = unread.end
                yield TokenEvent(tokens + end.token_ids, end.finish, end.usage, end.report)
                return
            if tokens:
                yield TokenEvent(tokens, None, None, None)
            if isinstance(unread.end, BatonError):
                raise unread.end

    async def finish_early(self) -> TokenEvent:
        return self._source.finish_early(self._entry)

    async def aclose(self) -> None:
        self._source.cancel(self._entry)


class DispatchSource:
    """Implements `TokenSource`; used on the event loop only."""

    def __init__(
        self,
        dispatch: Dispatch,
        candidates: Callable[[str], list[Candidate]],
        flush: Callable[[], None],
    ) -> None:
        self._dispatch = dispatch
        self._candidates = candidates
        self._flush = flush
        self._unread: dict[RequestKey, _Unread] = {}

    def submit(self, spec: GenerationSpec) -> DispatchStream:
        entry = self._dispatch.submit(spec, self._candidates(spec.model))
        unread = self._unread[entry.key] = _Unread()
        self._flush()
        return DispatchStream(self, entry, unread)

    def finish_early(self, entry: JournalEntry) -> TokenEvent:
        self._unread.pop(entry.key, None)
        event = self._dispatch.finish_early(entry)
        self._flush()
        return event

    def cancel(self, entry: JournalEntry) -> None:
        self._unread.pop(entry.key, None)
        self._dispatch.cancel(entry)
        self._flush()

    def deliver(self, key: RequestKey, event: TokenEvent | BatonError) -> None:
        """Put an event of the dispatcher before the request's reader."""
        unread = self._unread.get(key)
        if unread is None:
            return
        if isinstance(event, TokenEvent) and event.finish is None:
            unread.tokens.extend(event.token_ids)
        else:
            unread.end = event
            del self._unread[key]
        unread.changed.set()
