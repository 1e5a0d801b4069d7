"""Waiting with a deadline instead of sleeping: a stop event ends the wait at once."""

import asyncio
from collections.abc import AsyncIterator


async def every(period_s: float, stop: asyncio.Event) -> AsyncIterator[None]:
    """Yields now and then each `period_s` until `stop` is set."""
    while not stop.is_set():
        yield
        await wait_for(stop, period_s)


async def wait_for(event: asyncio.Event, timeout_s: float) -> bool:
    """Whether the event was set within the time."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True
