"""Waiting with a deadline instead of sleeping: a stop event ends the wait at once."""

import asyncio
from collections.abc import AsyncIterator


async def every(period_s: float, stop: asyncio.Event) -> AsyncIterator[None]:
    """Yields now and then each `period_s` until `stop` is set."""
    while not stop.is_set():
        yield
        await wait_for(stop, period_s)


class Punctuality:
    """Whether a loop came round in time: the silence of others counts only while it did."""

    def __init__(self, period_s: float, now: float) -> None:
        self._period_s = period_s
        self._last = now

    def was_late(self, now: float) -> bool:
        """To be asked once per round."""
        away_s, self._last = now - self._last, now
        return away_s > 2 * self._period_s


async def wait_for(event: asyncio.Event, timeout_s: float) -> bool:
    """Whether the event was set within the time."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True
