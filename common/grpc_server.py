"""A gRPC server that never leaks an exception's text, with health and reflection.

grpc.aio answers UNKNOWN with the text of whatever a handler raises; `CatchAll` stands before every
servicer and turns a BatonError into its status and anything else into INTERNAL without text.
"""

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from baton.common.errors import BatonError, ConfigError
from baton.common.grpc_options import ChannelOptions, server_options
from baton.common.status import status_of

log = logging.getLogger(__name__)

_HIDDEN = "internal error; the server's log has the details"
_NO_MEMORY = "no memory for the request; try again"


class CatchAll(grpc.aio.ServerInterceptor):
    """The last stop of every exception of a servicer."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                _guard_unary(handler.unary_unary, method),
                request_deserializer=_guard_decode(handler.request_deserializer),
                response_serializer=handler.response_serializer,
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                _guard_stream(handler.unary_stream, method),
                request_deserializer=_guard_decode(handler.request_deserializer),
                response_serializer=handler.response_serializer,
            )
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                _guard_stream(handler.stream_stream, method),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        return handler


class Undecodable:
    """Stands for a request that could not be decoded, so that the handler's guard can refuse it."""

    def __init__(self, error: Exception) -> None:
        # protobuf has one error for both, and says which in its text.
        self.lacks_memory = isinstance(error, MemoryError) or "alloc failed" in str(error)


def _guard_decode(decode: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if decode is None:
        return None

    def guarded(data: bytes) -> Any:
        try:
            return decode(data)
        # protobuf's DecodeError derives from Exception alone; the library would answer UNKNOWN.
        except Exception as error:
            refused = Undecodable(error)
            why = "for which there is no memory" if refused.lacks_memory else "that is no protobuf"
            log.info("refused a request of %d bytes %s", len(data), why)
            return refused

    return guarded


async def _refuse_undecodable(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    if isinstance(request, Undecodable) and request.lacks_memory:
        await context.abort(grpc.StatusCode.UNAVAILABLE, _NO_MEMORY)
    if isinstance(request, Undecodable):
        await context.abort(
            grpc.StatusCode.INVALID_ARGUMENT, "the request is not a valid protobuf message"
        )


async def _abort(
    error: Exception, method: str, context: grpc.aio.ServicerContext[Any, Any]
) -> None:
    if type(error).__name__ == "ExecuteBatchError":
        # gRPC has no public name for it: the client has gone, and nobody can be told anything.
        raise error
    if isinstance(error, BatonError):
        await context.abort(status_of(error).grpc, error.message)
    if isinstance(error, MemoryError):
        log.error("no memory for %s", method)
        await context.abort(grpc.StatusCode.UNAVAILABLE, _NO_MEMORY)
    log.error("%s failed", method, exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, _HIDDEN)


def _guard_unary(
    behaviour: Callable[..., Awaitable[Any]], method: str
) -> Callable[..., Awaitable[Any]]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await _refuse_undecodable(request, context)
        try:
            return await behaviour(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            return await _abort(error, method, context)

    return guarded


def _guard_stream(
    behaviour: Callable[..., AsyncGenerator[Any, None]], method: str
) -> Callable[..., AsyncIterator[Any]]:
    async def guarded(
        request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Any]:
        await _refuse_undecodable(request, context)
        try:
            # A cancelled call closes the servicer's generator at once, not when it is collected.
            async with aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    yield response
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(error, method, context)

    return guarded


class GrpcServer:
    """One listening port: servicers added before `start`, health and reflection included."""

    def __init__(self, options: ChannelOptions | None = None) -> None:
        """`options` of gRPC beyond those of every server."""
        self.server = grpc.aio.server(
            interceptors=[CatchAll()], options=[*server_options(), *(options or [])]
        )
        self._health = health_aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        self._names: list[str] = []
        self._is_serving = False

    def add(self, name: str) -> None:
        """Name a service whose servicer was added to `server`, for health and reflection."""
        self._names.append(name)

    def listen(self, address: str) -> int:
        """Bind `host:port` (port 0 takes a free one) and return the port.

        Raises ConfigError when the address cannot be bound.
        """
        try:
            return self.server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {address}: the port is taken or the address is not ours"
            ) from error

    async def start(self) -> None:
        names = [*self._names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name]
        reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], self.server)
        await self.server.start()
        await self.set_serving(True)

    async def set_serving(self, is_serving: bool) -> None:
        """What grpc.health.v1 answers from now on; calls are served either way."""
        if is_serving is self._is_serving:
            return
        self._is_serving = is_serving
        status = health_pb2.HealthCheckResponse
        for name in ["", *self._names]:
            await self._health.set(name, status.SERVING if is_serving else status.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Say NOT_SERVING, let running calls end within the grace, then close."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace_s)
