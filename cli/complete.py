"""`baton complete`: continue a text, and say what it took."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

from cyclopts import Parameter

from baton.cli.flags import JsonFlag, RouterFlag
from baton.cli.terminal import (
    counted,
    human_bytes,
    human_seconds,
    show_json,
    show_text,
    tell_table,
)
from baton.client.client import DEFAULT_ROUTER, BatonClient
from baton.client.replies import Chunk, Finish


def complete(
    prompt: Annotated[str, Parameter(help="raw text, no chat template", allow_leading_hyphen=True)],
    /,
    *,
    max_tokens: Annotated[int | None, Parameter(help="longest answer")] = None,
    temperature: Annotated[float | None, Parameter(help="0 takes the likeliest token")] = None,
    top_p: Annotated[float | None, Parameter(help="share of probability to draw from")] = None,
    top_k: Annotated[int | None, Parameter(help="likeliest tokens to draw from")] = None,
    seed: Annotated[int | None, Parameter(help="the same seed draws the same tokens")] = None,
    stop: Annotated[
        list[str] | None, Parameter(negative="", help="end before this text; may be repeated")
    ] = None,
    ignore_eos: Annotated[
        bool | None, Parameter(negative="", help="go on after an end-of-text token")
    ] = None,
    model: Annotated[str, Parameter(help="needed when several are served")] = "",
    router: RouterFlag = DEFAULT_ROUTER,
    as_json: JsonFlag = False,
) -> None:
    """Continue PROMPT; the text goes to stdout, what it took to stderr."""

    async def run() -> None:
        async with BatonClient(router) as client:
            chunks = client.generate(
                prompt,
                model=model,
                stop=tuple(stop or ()),
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed,
                ignore_eos=ignore_eos,
            )
            pieces: list[Chunk] = []
            async for chunk in chunks:
                pieces.append(chunk)
                if not as_json:
                    show_text(chunk.text)
        if as_json:
            show_json(as_object(pieces))
            return
        show_text("\n")
        finish = pieces[-1].finish
        assert finish is not None, "the client raises when an answer has no finish"
        tell_table(("", ""), what_it_took(finish))

    asyncio.run(run())


def as_object(pieces: Sequence[Chunk]) -> dict[str, Any]:
    """The answer and its report as one flat object."""
    finish = pieces[-1].finish
    assert finish is not None, "the last piece carries the finish"
    report = asdict(finish)
    return {
        "text": "".join(piece.text for piece in pieces),
        "token_ids": [token for piece in pieces for token in piece.token_ids],
        "finish_reason": report.pop("reason"),
        **report,
    }


def what_it_took(finish: Finish) -> list[tuple[str, str]]:
    """The report as named lines."""
    kv = "nothing crossed"
    if finish.transport:
        blocks = counted(finish.kv_blocks, "block")
        kv = f"{human_bytes(finish.kv_bytes)} in {blocks} by {finish.transport}"
    answered = counted(finish.completion_tokens, "token")
    per_token = human_seconds(finish.tpot_s) if finish.completion_tokens > 1 else "only one token"
    return [
        ("route", " → ".join(filter(None, (finish.prefill_worker, finish.decode_worker)))),
        ("mode", finish.mode.value),
        ("prompt", f"{counted(finish.prompt_tokens, 'token')}: {_split(finish)}"),
        ("answer", f"{answered}, ended by {finish.reason.value}"),
        ("KV moved", kv),
        ("time to first token", human_seconds(finish.ttft_s)),
        ("time per output token", per_token),
    ]


def _split(finish: Finish) -> str:
    return f"{finish.cached_tokens} cached, {finish.prefill_computed_tokens} computed"
