"""Tokens to text: one request's stream with detokenizing and stop strings applied."""

from collections.abc import AsyncGenerator, Collection
from dataclasses import dataclass, replace
from typing import Final

from baton.common.errors import InternalError
from baton.common.sampling import FinishReason
from baton.router.detokenizer import Detokenizer
from baton.router.generation import GenerationSpec, Report, TokenEvent, TokenSource, Usage
from baton.router.intake import Admitted
from baton.router.stop_matcher import StopMatcher

_NO_FINISH: Final = "the token stream ended without a finish"


@dataclass(frozen=True, slots=True)
class TextEvent:
    """Text that became final with these tokens. The last event, and only that, has the others."""

    text: str
    token_ids: list[int]
    finish: FinishReason | None
    usage: Usage | None
    report: Report | None


def open_answer(source: TokenSource, admitted: Admitted) -> AsyncGenerator[TextEvent, None]:
    """Submit an admitted request at the first read, and read its answer. Reading raises BatonError.

    Close the generator to cancel the request.
    """
    model, spec = admitted.model, admitted.spec
    detokenizer = Detokenizer(model.tokenizer.raw, spec.prompt_tokens)
    end_ids = model.defaults.eos_token_ids.union(spec.sampling.stop_token_ids)
    if spec.stop:
        return _read_until(source, spec, detokenizer, end_ids)
    return _read(source, spec, detokenizer, end_ids)


def _visible(event: TokenEvent, end_ids: Collection[int]) -> list[int]:
    """The event's tokens without the one that ended the answer, whose text nobody asked for."""
    ids = event.token_ids
    if event.finish is FinishReason.STOP and ids and ids[-1] in end_ids:
        return ids[:-1]
    return ids


async def _read(
    source: TokenSource, spec: GenerationSpec, detokenizer: Detokenizer, end_ids: Collection[int]
) -> AsyncGenerator[TextEvent, None]:
    stream = source.submit(spec)
    try:
        async for event in stream:
            text = detokenizer.push(_visible(event, end_ids))
            if event.finish is None:
                yield TextEvent(text, event.token_ids, None, None, None)
            else:
                text += detokenizer.flush()
                yield TextEvent(text, event.token_ids, event.finish, event.usage, event.report)
                return
        raise InternalError(_NO_FINISH)
    finally:
        await stream.aclose()


async def _read_until(
    source: TokenSource, spec: GenerationSpec, detokenizer: Detokenizer, end_ids: Collection[int]
) -> AsyncGenerator[TextEvent, None]:
    """As `_read`, but token by token: the answer ends with the one that completes a stop."""
    matcher = StopMatcher(spec.stop)
    num_tokens = 0
    stream = source.submit(spec)
    try:
        async for event in stream:
            text, taken, is_stopped = _match(event, detokenizer, matcher, end_ids)
            num_tokens += len(taken)
            if is_stopped:
                last = event if event.finish is not None else await stream.finish_early()
                yield _stopped(text, taken, last, num_tokens)
                return
            yield TextEvent(text, taken, event.finish, event.usage, event.report)
            if event.finish is not None:
                return
        raise InternalError(_NO_FINISH)
    finally:
        await stream.aclose()


def _match(
    event: TokenEvent, detokenizer: Detokenizer, matcher: StopMatcher, end_ids: Collection[int]
) -> tuple[str, list[int], bool]:
    """The event's final text, its tokens as far as they count, and whether a stop matched."""
    parts = []
    for index, token in enumerate(_visible(event, end_ids)):
        text, is_stopped = matcher.push(detokenizer.push([token]))
        parts.append(text)
        if is_stopped:
            return "".join(parts), event.token_ids[: index + 1], True
    if event.finish is not None:
        text, is_stopped = matcher.push(detokenizer.flush())
        parts.append(text if is_stopped else text + matcher.flush())
        return "".join(parts), event.token_ids, is_stopped
    return "".join(parts), event.token_ids, False


def _stopped(text: str, taken: list[int], last: TokenEvent, num_tokens: int) -> TextEvent:
    """The workers may have been ahead of the match: usage counts what the client got."""
    assert last.usage is not None, "the last event of a stream carries usage"
    usage = replace(last.usage, completion_tokens=num_tokens)
    return TextEvent(text, taken, FinishReason.STOP, usage, last.report)
