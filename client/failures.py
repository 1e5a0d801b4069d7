"""A gRPC error as an error of Baton, keeping what the server said.

A router names its error by the `reason` of google.rpc.ErrorInfo; without one the code decides.
"""

from typing import Final

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from baton.common.errors import (
    AlreadyExists,
    BatonError,
    BodyTooLarge,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NoCapacity,
    UnknownRequest,
    from_reason,
)


class RouterUnreachable(NoCapacity):
    """No router answers at the address, or the connection broke before the answer ended."""

    reason = "router_unreachable"


_BY_CODE: Final[dict[grpc.StatusCode, type[BatonError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.RESOURCE_EXHAUSTED: BodyTooLarge,
    grpc.StatusCode.NOT_FOUND: UnknownRequest,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: ConfigError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
}


def baton_error(error: grpc.aio.AioRpcError, address: str) -> BatonError:
    """The error to raise for `error`, met while talking to `address`."""
    status = _rich_status(error)
    details = _Details(status) if status is not None else None
    if details is not None and details.reason:
        found = from_reason(details.reason, error.details() or details.reason)
        found.field = details.field
        found.retry_after_s = details.retry_after_s
        return found
    return _by_code(error.code(), error.details() or "no details", address)


def _by_code(code: grpc.StatusCode, said: str, address: str) -> BatonError:
    if code is grpc.StatusCode.UNAVAILABLE and "://" in address:
        return RouterUnreachable(f"{address!r} is no HOST:PORT; leave out what comes before ://")
    if code is grpc.StatusCode.UNAVAILABLE and "HTTP/2" in said:
        return RouterUnreachable(
            f"{address} does not speak gRPC; name the router's gRPC port, not its HTTP port"
        )
    if code is grpc.StatusCode.UNAVAILABLE:
        return RouterUnreachable(
            f"no answer from {address} ({said}); start a cluster with `baton up`, or name "
            "another router"
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ConfigError(
            f"{address} does not offer this service ({said}); the inference port of a router is "
            "not its admin port, and neither is its HTTP port"
        )
    if code in _BY_CODE:
        return _BY_CODE[code](said)
    return InternalError(f"{code.name}: {said}")


def _rich_status(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    try:
        return rpc_status.from_call(error)
    except ValueError:
        # A server whose details contradict its code is not one of ours: the code decides.
        return None


class _Details:
    """What google.rpc details say, each absent one as its empty value."""

    def __init__(self, status: status_pb2.Status) -> None:
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        wanted: tuple[Message, ...] = (info, bad, retry)
        has_retry = False
        for packed in status.details:
            for message in wanted:
                if packed.Is(message.DESCRIPTOR):
                    packed.Unpack(message)
                    has_retry = has_retry or message is retry
        self.reason = info.reason
        self.field = bad.field_violations[0].field if bad.field_violations else None
        self.retry_after_s = retry.retry_delay.ToTimedelta().total_seconds() if has_retry else None
