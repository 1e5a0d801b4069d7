"""`baton chat`: a talk with a model, which remembers what was said."""

import asyncio
import sys
from typing import Annotated

from cyclopts import Parameter

from baton.cli.complete import what_it_took
from baton.cli.flags import RouterFlag
from baton.cli.terminal import show_text, tell, tell_table
from baton.client.client import DEFAULT_ROUTER, BatonClient, SamplingFields
from baton.client.replies import Finish, Message
from baton.common.errors import BatonError


def chat(
    message: Annotated[str | None, Parameter(help="say this alone, and end")] = None,
    /,
    *,
    system: Annotated[str | None, Parameter(help="what the model is told before")] = None,
    max_tokens: Annotated[int | None, Parameter(help="longest answer")] = None,
    temperature: Annotated[float | None, Parameter(help="0 takes the likeliest token")] = None,
    top_p: Annotated[float | None, Parameter(help="share of probability to draw from")] = None,
    seed: Annotated[int | None, Parameter(help="the same seed draws the same tokens")] = None,
    model: Annotated[str, Parameter(help="needed when several are served")] = "",
    router: RouterFlag = DEFAULT_ROUTER,
) -> None:
    """Talk to a model until end of input (Ctrl-D); Ctrl-C stops an answer."""
    sampling = SamplingFields(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    with asyncio.Runner() as runner:
        talk = _Talk(router, model, system, sampling)
        try:
            runner.run(talk.open())
            if message is not None:
                finish = runner.run(talk.say(message))
                tell_table(("", ""), what_it_took(finish))
            else:
                _converse(runner, talk)
        finally:
            runner.run(talk.close())


def _converse(runner: asyncio.Runner, talk: "_Talk") -> None:
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        # Line editing and history for input().
        import readline  # noqa: F401

        tell("Ctrl-D ends the talk, Ctrl-C stops an answer")
    while True:
        try:
            line = input("> " if is_terminal else "")
        except EOFError:
            if is_terminal:
                tell("")
            return
        except KeyboardInterrupt:
            # Meant for an answer that ended just before, or for the line typed so far.
            if not is_terminal:
                raise
            tell("")
            continue
        if not line.strip():
            continue
        try:
            runner.run(talk.say(line))
        except KeyboardInterrupt:
            tell("\nstopped")
        except BatonError as error:
            if not is_terminal:
                raise
            tell(f"error: {error.message}")


class _Talk:
    """One connection and the messages so far; an answer that was stopped is not remembered."""

    def __init__(
        self, router: str, model: str, system: str | None, sampling: SamplingFields
    ) -> None:
        self._router = router
        self._model = model
        self._sampling = sampling
        self._messages = [Message("system", system)] if system is not None else []

    async def open(self) -> None:
        # A channel belongs to the loop that it was made on.
        self._client = BatonClient(self._router)

    async def close(self) -> None:
        await self._client.close()

    async def say(self, text: str) -> Finish:
        asked = [*self._messages, Message("user", text)]
        pieces = []
        async for chunk in self._client.generate(asked, model=self._model, **self._sampling):
            pieces.append(chunk.text)
            show_text(chunk.text)
        show_text("\n")
        assert chunk.finish is not None, "generate raises for an answer without a finish"
        self._messages = [*asked, Message("assistant", "".join(pieces))]
        return chunk.finish
