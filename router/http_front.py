"""OpenAI's HTTP API over a token source.

One request is two tasks, whatever its length: one that answers and one that waits for the client
to hang up, which cancels the first and with it the request on its workers.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from baton.common.clock import Clock, SystemClock
from baton.common.errors import BatonError, InternalError, NoCapacity
from baton.common.status import status_of
from baton.router.answer import open_answer
from baton.router.catalog import Catalog
from baton.router.generation import TokenSource
from baton.router.http_reply import Reply, envelope, error_envelope
from baton.router.intake import REQUEST_ID_PATTERN, Admitted, Intake
from baton.router.json_body import ClientGone, read_json_body
from baton.router.openai_request import Asked, parse_chat, parse_completion
from baton.router.openai_response import AnswerWriter, ChatWriter, CompletionWriter
from baton.router.openai_types import JSON, ErrorEnvelope, ModelBody, ModelList
from baton.router.served_model import ServedModel

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S: Final = 600.0
DISTRIBUTION: Final = "kvbaton"
_HIDDEN: Final = "internal error; the server's log has the details"
_CODES: Final = {404: "not_found", 405: "method_not_allowed", 415: "unsupported_media_type"}

Parser = Callable[[dict[str, Any], float], Asked]
WriterMaker = Callable[[str, str, int, bool], AnswerWriter]


@dataclass(frozen=True, slots=True)
class _Front:
    """What the endpoints share."""

    source: TokenSource
    catalog: Catalog
    intake: Intake
    clock: Clock
    timeout_s: float


def build_app(
    source: TokenSource,
    catalog: Catalog,
    intake: Intake,
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    clock: Clock | None = None,
) -> Starlette:
    """The ASGI application. `timeout_s`: the deadline of a request, which HTTP cannot name."""
    front = _Front(source, catalog, intake, clock or SystemClock(), timeout_s)
    pages = _Pages(front)
    chat = _Generation(front, parse_chat, ChatWriter)
    completion = _Generation(front, parse_completion, CompletionWriter)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completion, methods=["POST"]),
            Route("/v1/models", pages.models),
            Route("/v1/models/{name:path}", pages.model),
            Route("/health", pages.ready),
            Route("/ready", pages.ready),
            Route("/live", pages.live),
            Route("/version", pages.version),
        ],
        exception_handlers={HTTPException: _http_error, BatonError: _baton_error},
    )


class _Generation:
    """One generating endpoint, as an ASGI application of its own."""

    def __init__(self, front: _Front, parse: Parser, writer: WriterMaker) -> None:
        self._front = front
        self._parse = parse
        self._writer = writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wished = Headers(scope=scope).get("x-request-id", "")
        is_usable = REQUEST_ID_PATTERN.fullmatch(wished) is not None
        reply = Reply(send, self._front.intake.name_request(wished if is_usable else ""))
        try:
            asked = self._parse(await read_json_body(scope, receive), self._front.timeout_s)
            if asked.request.request_id and not is_usable:
                reply.request_id = self._front.intake.name_request(asked.request.request_id)
            await _unless_gone(self._answer(asked, reply), receive)
        except ClientGone:
            log.info("%s: the client hung up", reply.request_id)
        except BatonError as error:
            await reply.fail(error)
        except HTTPException as error:
            await reply.whole(error.status_code, JSON.encode(_envelope(error)))
        except MemoryError:
            log.error("%s: no memory for the request", reply.request_id)
            await reply.fail(NoCapacity("no memory for the request; try again", retry_after_s=1.0))
        except Exception:
            log.exception("%s failed", reply.request_id)
            await reply.fail(InternalError(_HIDDEN))

    async def _answer(self, asked: Asked, reply: Reply) -> None:
        admitted = await self._front.intake.admit(asked.request, reply.request_id)
        created = self._front.clock.unix_ms() // 1000
        name = admitted.model.name
        writer = self._writer(reply.request_id, name, created, asked.include_usage)
        if asked.is_stream:
            await self._stream(admitted, writer, reply)
        else:
            await self._collect(admitted, writer, reply)

    async def _stream(self, admitted: Admitted, writer: AnswerWriter, reply: Reply) -> None:
        """Events as they come; the first starts the response, so that a refusal has a status."""
        opening: bytes | None = writer.opening()
        async with aclosing(open_answer(self._front.source, admitted)) as events:
            async for event in events:
                is_last = event.finish is not None
                if not is_last and not event.text and opening is None:
                    continue
                body = writer.closing(event) if is_last else writer.text(event.text)
                if opening is not None:
                    await reply.open_stream(opening + body)
                    opening = None
                else:
                    await reply.add(body)
        await reply.close_stream(b"")

    async def _collect(self, admitted: Admitted, writer: AnswerWriter, reply: Reply) -> None:
        parts = []
        async with aclosing(open_answer(self._front.source, admitted)) as events:
            async for event in events:
                parts.append(event.text)
        await reply.whole(200, writer.whole("".join(parts), event))


async def _unless_gone(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Run `work`; when the client hangs up first, cancel it, wait for its end, raise ClientGone."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
    finally:
        is_done = task.done()
        watch.cancel()
        task.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
    if not is_done:
        raise ClientGone
    task.result()


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


class _Pages:
    """Everything that is answered from what the router knows by itself."""

    def __init__(self, front: _Front) -> None:
        self._front = front
        self._started = front.clock.unix_ms() // 1000

    def _body(self, model: ServedModel) -> ModelBody:
        return ModelBody(model.name, self._started, model.max_model_len)

    async def models(self, _request: Request) -> Response:
        return _json(ModelList([self._body(model) for model in self._front.catalog.models()]))

    async def model(self, request: Request) -> Response:
        return _json(self._body(self._front.catalog.get(request.path_params["name"])))

    async def ready(self, _request: Request) -> Response:
        """200 when a request could be served now: see `Catalog.is_ready`."""
        is_ready = self._front.catalog.is_ready()
        words = {"status": "ready" if is_ready else "not ready"}
        return _json(words, 200 if is_ready else 503)

    async def live(self, _request: Request) -> Response:
        return _json({"status": "live"})

    async def version(self, _request: Request) -> Response:
        return _json({"version": version(DISTRIBUTION)})


def _json(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(JSON.encode(content), status, headers, media_type="application/json")


def _envelope(error: HTTPException) -> ErrorEnvelope:
    code = _CODES.get(error.status_code, "invalid_request")
    return envelope(error.detail, "invalid_request_error", code)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for this class alone"
    # Starlette's own words for these two say neither what was asked nor what there is.
    if error.status_code == 404:
        error.detail = "there is nothing at this path; the API is at /v1, as in /v1/models"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        error.detail = f"{request.method} is not for this path; it takes {allowed}"
    headers = dict(error.headers) if error.headers else None
    return _json(_envelope(error), error.status_code, headers)


async def _baton_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, BatonError), "registered for this class alone"
    return _json(error_envelope(error), status_of(error).http)
