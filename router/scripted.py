"""A token source that plays a script: what the fronts see of a cluster, without one."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from baton.common.errors import BatonError
from baton.common.sampling import FinishReason, Mode
from baton.router.generation import GenerationSpec, Report, TokenEvent, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """One answer: `frames` of token ids, then the finish, or `error` in its place.

    With `is_endless` the stream waits behind the last frame until somebody cancels it.
    """

    frames: Sequence[Sequence[int]]
    finish: FinishReason = FinishReason.LENGTH
    error: BatonError | None = None
    is_endless: bool = False
    cached_tokens: int = 0


@dataclass(slots=True)
class ScriptedStream:
    """One played request and how it ended."""

    spec: GenerationSpec
    script: Script
    num_played: int = 0
    is_cancelled: bool = False
    is_finished_early: bool = False
    has_ended: bool = False
    # Set when the stream is cancelled, for tests that wait for it.
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        frames = [list(frame) for frame in self.script.frames]
        ends_well = self.script.error is None and not self.script.is_endless
        body, last = (frames[:-1], frames[-1:]) if ends_well else (frames, [])
        for frame in body:
            self.num_played += len(frame)
            yield TokenEvent(frame, None, None, None)
        if self.script.error is not None:
            self.has_ended = True
            raise self.script.error
        if self.script.is_endless:
            await self.cancelled.wait()
            return
        tokens = last[0] if last else []
        self.num_played += len(tokens)
        self.has_ended = True
        yield self._last(tokens, self.script.finish)

    async def finish_early(self) -> TokenEvent:
        self.is_finished_early = True
        self.has_ended = True
        return self._last([], FinishReason.STOP)

    async def aclose(self) -> None:
        if not self.has_ended:
            self.has_ended = True
            self.is_cancelled = True
            self.cancelled.set()

    def _last(self, tokens: list[int], finish: FinishReason) -> TokenEvent:
        prompt_len, cached = len(self.spec.prompt_tokens), self.script.cached_tokens
        report = Report(
            request_id=self.spec.request_id,
            mode=Mode.DISAGG,
            prefill_worker="prefill-0",
            decode_worker="decode-0",
            kv_bytes=4096,
            kv_blocks=1,
            transport="scripted",
            ttft_s=0.25,
            tpot_s=0.01,
            prefill_computed_tokens=prompt_len - cached,
            decode_forwarded_tokens=max(0, self.num_played - 1),
            decode_cached_tokens=0,
            attempts=1,
        )
        return TokenEvent(tokens, finish, Usage(prompt_len, self.num_played, cached), report)


class ScriptedSource:
    """Plays the scripts in turn, the last one for ever. `streams`: every request so far."""

    def __init__(self, *scripts: Script) -> None:
        assert scripts, "a source without a script answers nothing"
        self._scripts = scripts
        self.streams: list[ScriptedStream] = []

    def submit(self, spec: GenerationSpec) -> ScriptedStream:
        script = self._scripts[min(len(self.streams), len(self._scripts) - 1)]
        stream = ScriptedStream(spec, script)
        self.streams.append(stream)
        return stream
