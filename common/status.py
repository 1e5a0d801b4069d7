"""Error class to gRPC code and HTTP status: the one table.

The HTTP column follows the gRPC one as google.rpc.code documents it, except where OpenAI clients
expect otherwise (FAILED_PRECONDITION is 400, a body over the limit 413).
"""

from dataclasses import dataclass
from typing import Final

import grpc

from baton.common.errors import (
    AlreadyExists,
    BatonError,
    BodyTooLarge,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    ExceedsKvCapacity,
    GrantRefused,
    HandshakeMismatch,
    InternalError,
    InvalidRequest,
    ModelError,
    ModelNotFound,
    NoCapacity,
    SlowReader,
    TransferError,
    UnknownRequest,
    UnknownWorker,
    WorkerLost,
)


@dataclass(frozen=True, slots=True)
class Status:
    """What the two fronts answer. `kind` is OpenAI's `error.type`."""

    grpc: grpc.StatusCode
    http: int
    kind: str


_TABLE: Final[dict[type[BatonError], Status]] = {
    InvalidRequest: Status(grpc.StatusCode.INVALID_ARGUMENT, 400, "invalid_request_error"),
    BodyTooLarge: Status(grpc.StatusCode.RESOURCE_EXHAUSTED, 413, "invalid_request_error"),
    ExceedsKvCapacity: Status(grpc.StatusCode.FAILED_PRECONDITION, 400, "invalid_request_error"),
    ModelNotFound: Status(grpc.StatusCode.NOT_FOUND, 404, "invalid_request_error"),
    UnknownRequest: Status(grpc.StatusCode.NOT_FOUND, 404, "invalid_request_error"),
    UnknownWorker: Status(grpc.StatusCode.NOT_FOUND, 404, "invalid_request_error"),
    AlreadyExists: Status(grpc.StatusCode.ALREADY_EXISTS, 409, "invalid_request_error"),
    NoCapacity: Status(grpc.StatusCode.UNAVAILABLE, 503, "server_error"),
    DeadlineExceeded: Status(grpc.StatusCode.DEADLINE_EXCEEDED, 504, "server_error"),
    Cancelled: Status(grpc.StatusCode.CANCELLED, 499, "server_error"),
    SlowReader: Status(grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "invalid_request_error"),
    WorkerLost: Status(grpc.StatusCode.UNAVAILABLE, 503, "server_error"),
    HandshakeMismatch: Status(grpc.StatusCode.FAILED_PRECONDITION, 500, "server_error"),
    GrantRefused: Status(grpc.StatusCode.PERMISSION_DENIED, 500, "server_error"),
    TransferError: Status(grpc.StatusCode.UNAVAILABLE, 503, "server_error"),
    ModelError: Status(grpc.StatusCode.FAILED_PRECONDITION, 500, "server_error"),
    ConfigError: Status(grpc.StatusCode.FAILED_PRECONDITION, 500, "server_error"),
    InternalError: Status(grpc.StatusCode.INTERNAL, 500, "server_error"),
    BatonError: Status(grpc.StatusCode.INTERNAL, 500, "server_error"),
}


def status_of(error: BatonError | type[BatonError]) -> Status:
    """The status of an error: that of the nearest class up its tree."""
    cls = error if isinstance(error, type) else type(error)
    for parent in cls.__mro__:
        if parent in _TABLE:
            return _TABLE[parent]
    raise AssertionError(f"{cls.__name__} is not a BatonError")
