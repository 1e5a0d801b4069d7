"""Waiting for what tells nobody when it happens: look again until a deadline."""

import asyncio
from collections.abc import Awaitable, Callable

from baton.common.periodic import wait_for

LOOK_EVERY_S = 0.02


async def eventually(
    missing: Callable[[], Awaitable[object]], what: str, *, deadline_s: float = 15.0
) -> None:
    """Until `missing()` returns something empty; AssertionError with `what` and it at the deadline.

    Each look must end by itself.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + deadline_s
    never = asyncio.Event()
    while found := await missing():
        assert loop.time() < deadline, f"{what} after {deadline_s:g} s: {found}"
        await wait_for(never, LOOK_EVERY_S)
