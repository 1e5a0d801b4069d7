"""A BatonError as a gRPC status with google.rpc details."""

from typing import Any, Final, NoReturn

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from baton.common.errors import BatonError, InvalidRequest
from baton.common.status import status_of

DOMAIN: Final = "baton"
RETRY_AFTER_S: Final = 1.0


def rich_status(error: BatonError) -> status_pb2.Status:
    """Code and message, ErrorInfo with our reason, and what helps a client to do better.

    BadRequest names the field of an invalid request, RetryInfo the wait before the next try.
    """
    code = status_of(error).grpc
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)]
    if isinstance(error, InvalidRequest) and error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.message, reason=error.reason.upper()
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if code is grpc.StatusCode.UNAVAILABLE:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int((error.retry_after_s or RETRY_AFTER_S) * 1e9))
        details.append(retry)
    packed = [any_pb2.Any() for _ in details]
    for wrapper, detail in zip(packed, details, strict=True):
        wrapper.Pack(detail)
    number = code_pb2.Code.Value(code.name)
    return status_pb2.Status(code=number, message=error.message, details=packed)


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: BatonError) -> NoReturn:
    """End the call with the error's status and details."""
    status = rpc_status.to_status(rich_status(error))
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort raises")
