"""The sending half of one HTTP exchange: an answer, or an error in OpenAI's envelope."""

import math
from typing import Final

from starlette.types import Send

from baton.common.errors import BatonError
from baton.common.status import status_of
from baton.router.openai_response import sse
from baton.router.openai_types import JSON, ErrorBody, ErrorEnvelope

RETRY_AFTER_S: Final = 1.0
_RETRYABLE: Final = frozenset({429, 503})

Headers = list[tuple[bytes, bytes]]


def envelope(message: str, kind: str, code: str, field: str | None = None) -> ErrorEnvelope:
    return ErrorEnvelope(ErrorBody(message, kind, field, code))


def error_envelope(error: BatonError) -> ErrorEnvelope:
    return envelope(error.message, status_of(error).kind, error.reason, error.field)


def retry_headers(error: BatonError) -> Headers:
    """Retry-After, in whole seconds, for errors that time may heal."""
    if status_of(error).http not in _RETRYABLE:
        return []
    seconds = error.retry_after_s or RETRY_AFTER_S
    return [(b"retry-after", str(max(1, math.ceil(seconds))).encode())]


class Reply:
    """Sends one response. Before its start an error has a status; after it, an event of its own."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self._has_started = False

    async def whole(self, status: int, body: bytes, extra: Headers | None = None) -> None:
        """A complete JSON response."""
        length = (b"content-length", str(len(body)).encode())
        await self._start(status, b"application/json", [length, *(extra or [])])
        await self._send({"type": "http.response.body", "body": body})

    async def open_stream(self, body: bytes) -> None:
        """Status 200 and the first bytes of an event stream."""
        # Proxies such as nginx would otherwise collect events before passing them on.
        extra = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await self._start(200, b"text/event-stream; charset=utf-8", extra)
        await self.add(body)

    async def add(self, body: bytes) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def close_stream(self, body: bytes) -> None:
        await self._send({"type": "http.response.body", "body": body})

    async def fail(self, error: BatonError) -> None:
        """The error, as whatever can still be sent."""
        if self._has_started:
            await self.close_stream(sse(error_envelope(error)))
        else:
            body = JSON.encode(error_envelope(error))
            await self.whole(status_of(error).http, body, retry_headers(error))

    async def _start(self, status: int, content_type: bytes, extra: Headers) -> None:
        self._has_started = True
        headers = [
            (b"content-type", content_type),
            (b"x-request-id", self.request_id.encode()),
            *extra,
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
