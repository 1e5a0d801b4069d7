"""An HTTP request's body as a JSON object, read with limits on size, time and form."""

import asyncio
import json
import re
from typing import Any, Final, NoReturn

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope

from baton.common.errors import BodyTooLarge, InvalidRequest

MAX_BODY_BYTES: Final = 4 * 1024 * 1024
BODY_TIMEOUT_S: Final = 30.0
_SURROGATE_ESCAPE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


class ClientGone(Exception):
    """The client closed the connection; nobody is left to answer."""


async def read_json_body(scope: Scope, receive: Receive) -> dict[str, Any]:
    """The body's object.

    Raises InvalidRequest (malformed, a key twice, NaN, lone surrogates), BodyTooLarge,
    HTTPException 408 or 415, and ClientGone.
    """
    headers = Headers(scope=scope)
    _check_headers(headers)
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            body = await _read(receive)
    except TimeoutError:
        raise HTTPException(408, f"the body took longer than {BODY_TIMEOUT_S:g} s") from None
    return parse_object(body)


def _check_headers(headers: Headers) -> None:
    content_type = headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise HTTPException(415, "the content type must be application/json")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "compressed bodies are not taken; send the JSON as it is")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES:
        raise _too_large()


async def _read(receive: Receive) -> bytes:
    chunks: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        num_bytes += len(chunk)
        if num_bytes > MAX_BODY_BYTES:
            raise _too_large()
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _too_large() -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {MAX_BODY_BYTES} bytes; send less text")


def parse_object(body: bytes) -> dict[str, Any]:
    """`body` as a JSON object. Raises InvalidRequest, whose message never quotes the body."""
    try:
        parsed = json.loads(
            body.decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse_constant
        )
        if _SURROGATE_ESCAPE.search(body):
            # Halves of a pair are legal JSON only next to each other.
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        raise InvalidRequest("the body is not valid UTF-8 or holds a lone surrogate") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"the body is not valid JSON at line {error.lineno}, column {error.colno}: "
            f"{error.msg.removesuffix(' at')}"
        ) from None
    except ValueError:
        raise InvalidRequest("the body is not valid JSON: a number is too long") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    if not isinstance(parsed, dict):
        raise InvalidRequest("the body must be a JSON object")
    return parsed


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InvalidRequest("the body has an object with the same key twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"the body has {name}, which is not JSON")
