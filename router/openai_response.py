"""Answers in OpenAI's shapes: whole, or as server-sent events.

A writer belongs to one answer. Its chunks reuse one struct: encoding is all that a token costs.
"""

from typing import Final, Protocol

from msgspec import UNSET

from baton.common.sampling import FinishReason
from baton.router.answer import TextEvent
from baton.router.generation import Report
from baton.router.openai_types import (
    JSON,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    Completion,
    Delta,
    Message,
    TextChoice,
    UsageBody,
    usage_body,
)

DONE: Final = b"data: [DONE]\n\n"


def sse(content: object) -> bytes:
    """One server-sent event."""
    return b"data: " + JSON.encode(content) + b"\n\n"


class AnswerWriter(Protocol):
    """Bytes of one answer: `opening`, `text` as often as wanted, `closing`; or `whole`."""

    def opening(self) -> bytes: ...

    def text(self, text: str) -> bytes: ...

    def closing(self, last: TextEvent) -> bytes:
        """The last event's text, its finish, usage if asked for, the report, and [DONE]."""
        ...

    def whole(self, text: str, last: TextEvent) -> bytes: ...


class ChatWriter:
    """/v1/chat/completions."""

    def __init__(self, request_id: str, model: str, created: int, include_usage: bool) -> None:
        self._delta = Delta()
        self._choice = ChatChunkChoice(self._delta)
        usage = None if include_usage else UNSET
        id_ = f"chatcmpl-{request_id}"
        self._chunk = ChatChunk(id_, created, model, [self._choice], usage=usage)

    def opening(self) -> bytes:
        self._delta.role, self._delta.content = "assistant", ""
        opening = sse(self._chunk)
        self._delta.role = UNSET
        return opening

    def text(self, text: str) -> bytes:
        self._delta.content = text
        return sse(self._chunk)

    def closing(self, last: TextEvent) -> bytes:
        self._delta.content = last.text or UNSET
        self._choice.finish_reason = last.finish
        return _close(self._chunk, last)

    def whole(self, text: str, last: TextEvent) -> bytes:
        finish, usage, report = _ending(last)
        chunk, choice = self._chunk, ChatChoice(Message(text), finish)
        return JSON.encode(
            ChatCompletion(chunk.id, chunk.created, chunk.model, [choice], usage, report)
        )


class CompletionWriter:
    """/v1/completions."""

    def __init__(self, request_id: str, model: str, created: int, include_usage: bool) -> None:
        self._choice = TextChoice("")
        usage = None if include_usage else UNSET
        self._chunk = Completion(f"cmpl-{request_id}", created, model, [self._choice], usage=usage)

    def opening(self) -> bytes:
        return b""

    def text(self, text: str) -> bytes:
        self._choice.text = text
        return sse(self._chunk)

    def closing(self, last: TextEvent) -> bytes:
        self._choice.text = last.text
        self._choice.finish_reason = last.finish
        return _close(self._chunk, last)

    def whole(self, text: str, last: TextEvent) -> bytes:
        finish, usage, report = _ending(last)
        self._choice.text, self._choice.finish_reason = text, finish
        self._chunk.usage, self._chunk.baton = usage, report
        return JSON.encode(self._chunk)


def _close(chunk: ChatChunk | Completion, last: TextEvent) -> bytes:
    """The chunk that carries the finish and, when usage was asked for, one more without choices."""
    _, usage, report = _ending(last)
    finish = b""
    if chunk.usage is None:
        finish = sse(chunk)
        chunk.choices = []
        chunk.usage = usage
    chunk.baton = report
    return finish + sse(chunk) + DONE


def _ending(last: TextEvent) -> tuple[FinishReason, UsageBody, Report]:
    assert last.finish is not None, "the last event of an answer carries finish"
    assert last.usage is not None, "the last event of an answer carries usage"
    assert last.report is not None, "the last event of an answer carries the report"
    return last.finish, usage_body(last.usage), last.report
