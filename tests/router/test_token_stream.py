"""Tokens between the dispatcher and a client, who may read slowly or not at all."""

from collections.abc import AsyncIterator

import pytest
from support.router_desk import PREFILLED, PROMPT, Desk, first, identity, join, record

from baton.common.errors import SlowReader
from baton.common.messages import Cancel
from baton.common.metric_names import SLOW_CLIENTS
from baton.common.sampling import FinishReason, SamplingParams
from baton.common.timing import DEFAULT_TIMING
from baton.router.generation import GenerationSpec, TokenEvent
from baton.router.journal import JournalEntry
from baton.router.token_stream import MAX_UNREAD_TOKENS, DispatchSource, DispatchStream

P, D = identity("p0"), identity("d0")
SLOW_S = DEFAULT_TIMING.slow_client_s


class Tap:
    """A source over a dispatcher on paper."""

    def __init__(self) -> None:
        self.desk = Desk(P, D)
        self.source = DispatchSource(
            self.desk.dispatch, self.flush, clock=self.desk.clock, timing=DEFAULT_TIMING
        )

    def flush(self) -> None:
        self.desk.look()
        for request, event in self.desk.events:
            self.source.deliver(request, event)
        self.desk.events.clear()

    def open(self) -> tuple[DispatchStream, JournalEntry]:
        """A stream whose request decodes; its first token waits."""
        spec = GenerationSpec(
            request_id="req-1",
            model="tiny",
            prompt_tokens=PROMPT,
            sampling=SamplingParams(max_tokens=100_000),
            stop=(),
            tenant_key=b"",
            timeout_s=1e6,
        )
        stream = self.source.submit(spec)
        entry = stream._unread.entry
        self.tokens(entry, 1)
        return stream, entry

    def tokens(self, entry: JournalEntry, count: int, finish: FinishReason | None = None) -> None:
        start = entry.num_emitted
        if start == 0:
            self.desk.play(entry, (P, first()), (D, join()))
            count -= 1
            start = 1
        step = record(start, *range(start, start + count), finish=finish)
        self.desk.play(entry, (D, step))
        self.flush()

    def sweep(self) -> None:
        self.source.sweep()
        self.flush()


async def test_unread_tokens_coalesce_and_the_end_comes_with_the_last() -> None:
    tap = Tap()
    stream, entry = tap.open()
    tap.tokens(entry, 3)
    seen = [event async for event in _take(stream, 1)]
    tap.tokens(entry, 2, FinishReason.STOP)
    seen += [event async for event in stream]
    assert [event.token_ids for event in seen] == [[0, 1, 2, 3], [4, 5]]
    assert [event.finish for event in seen] == [None, FinishReason.STOP]


async def _take(stream: DispatchStream, count: int) -> AsyncIterator[TokenEvent]:
    async for event in stream:
        yield event
        count -= 1
        if not count:
            return


async def test_an_error_that_comes_while_the_reader_is_busy_waits_for_the_tokens() -> None:
    tap = Tap()
    stream, entry = tap.open()
    tokens: list[int] = []

    async def read() -> None:
        async for event in stream:
            tokens.extend(event.token_ids)
            if len(tokens) == 1:
                tap.tokens(entry, 2)
                tap.source.deliver(entry.transfer_id, SlowReader("broken off"))

    with pytest.raises(SlowReader):
        await read()
    assert tokens == [0, 1, 2]


async def test_a_client_that_takes_nothing_loses_its_request() -> None:
    tap = Tap()
    stream, entry = tap.open()
    tap.desk.clock.advance(SLOW_S - 0.1)
    tap.tokens(entry, 5)
    tap.sweep()
    assert not entry.has_ended
    tap.desk.clock.advance(0.1)
    tap.sweep()
    assert entry.has_ended
    assert tap.desk.dispatch.counters[SLOW_CLIENTS] == 1
    assert tap.desk.cancelled_on == [P, D]
    with pytest.raises(SlowReader, match="6 tokens unread"):
        await anext(aiter(stream))


async def test_who_takes_now_and_then_is_not_slow() -> None:
    tap = Tap()
    stream, entry = tap.open()
    reader = aiter(stream)
    for _ in range(5):
        tap.desk.clock.advance(SLOW_S - 0.1)
        tap.sweep()
        await anext(reader)
        tap.tokens(entry, 1)
    assert not entry.has_ended


async def test_a_request_that_brings_no_tokens_has_no_slow_client() -> None:
    tap = Tap()
    stream, entry = tap.open()
    await anext(aiter(stream))
    tap.desk.clock.advance(2 * SLOW_S)
    tap.sweep()
    assert not entry.has_ended


async def test_many_unread_tokens_are_too_many_at_once() -> None:
    tap = Tap()
    stream, entry = tap.open()
    tap.tokens(entry, MAX_UNREAD_TOKENS - 1)
    tap.sweep()
    assert not entry.has_ended
    tap.tokens(entry, 1)
    tap.sweep()
    assert entry.has_ended
    with pytest.raises(SlowReader, match=f"{MAX_UNREAD_TOKENS + 1} tokens"):
        await anext(aiter(stream))


async def test_closing_a_stream_cancels_its_request_once() -> None:
    tap = Tap()
    stream, entry = tap.open()
    await stream.aclose()
    await stream.aclose()
    cancels = [message for _, message in tap.desk.sends if isinstance(message, Cancel)]
    assert len(cancels) == 2, "one for each worker"
    tap.desk.play(entry, (P, record(0, 0, prefill=PREFILLED)))
    assert tap.desk.events == []
