"""Reading a stream whose end is an error."""

from collections.abc import AsyncIterable
from typing import TypeVar

T = TypeVar("T")


async def read_into(found: list[T], stream: AsyncIterable[T]) -> None:
    """Append what comes, so that it is there when the stream raises."""
    async for one in stream:
        found.append(one)  # noqa: PERF401 (a comprehension would lose what came)
