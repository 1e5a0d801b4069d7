"""A client that is gone when its call ends is no failure of the servicer."""

import logging
from collections.abc import AsyncIterator
from typing import Any, cast

import grpc
import pytest

from baton.common.errors import LeaseLost
from baton.common.grpc_server import _guard_stream, _guard_unary


class ExecuteBatchError(Exception):
    """As gRPC's own, which it raises from whatever is sent on a call that is over."""


class GoneContext:
    """Of a call whose client has gone: the first abort finds out, a second one is a misuse."""

    def __init__(self) -> None:
        self.num_aborts = 0

    async def abort(self, code: grpc.StatusCode, details: str = "") -> None:
        self.num_aborts += 1
        raise ExecuteBatchError(f"{code}: {details}")


async def test_a_stream_that_cannot_be_aborted_is_aborted_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def servicer(_request: object, context: Any) -> AsyncIterator[None]:
        try:
            raise LeaseLost("the lease has ended")
        except LeaseLost as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, error.message)
        yield

    context = GoneContext()
    responses = _guard_stream(cast("Any", servicer), "/a/b")(object(), context)
    with pytest.raises(ExecuteBatchError):
        await anext(aiter(responses))
    assert context.num_aborts == 1
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_a_call_that_cannot_be_aborted_is_aborted_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def servicer(_request: object, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "lost")

    context = GoneContext()
    with pytest.raises(ExecuteBatchError):
        await _guard_unary(servicer, "/a/b")(object(), context)
    assert context.num_aborts == 1
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
