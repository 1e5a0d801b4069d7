"""What a server answers to a request that it cannot decode: whose fault that is."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError

from baton.common.grpc_server import GrpcServer


def _fail(error: Exception) -> Callable[[bytes], Any]:
    def decode(_: bytes) -> Any:
        raise error

    return decode


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (
            DecodeError("Error parsing message with type 'x': Wire format was corrupt"),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (
            DecodeError("Error parsing message with type 'x': Arena alloc failed"),
            grpc.StatusCode.UNAVAILABLE,
        ),
        (MemoryError(), grpc.StatusCode.UNAVAILABLE),
    ],
    ids=["corrupt", "no memory in protobuf", "no memory"],
)
async def test_a_request_that_cannot_be_decoded(error: Exception, code: grpc.StatusCode) -> None:
    async def behaviour(request: Any, context: Any) -> bytes:
        raise AssertionError("it must not get there")

    server = GrpcServer()
    handler = grpc.unary_unary_rpc_method_handler(behaviour, request_deserializer=_fail(error))
    server.server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("test.Service", {"Ask": handler})]
    )
    port = server.listen("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary("/test.Service/Ask")(b"x", timeout=5)
    finally:
        await server.stop(0)
    assert refused.value.code() is code


async def test_a_handler_that_finds_no_memory_is_asked_again() -> None:
    async def behaviour(request: Any, context: Any) -> bytes:
        raise MemoryError

    server = GrpcServer()
    handler = grpc.unary_unary_rpc_method_handler(behaviour)
    server.server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("test.Service", {"Ask": handler})]
    )
    port = server.listen("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary("/test.Service/Ask")(b"x", timeout=5)
    finally:
        await server.stop(0)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
