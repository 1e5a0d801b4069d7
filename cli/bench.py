"""`baton bench recall`: whether a cluster answers right, and how soon.

Each prompt holds facts with made-up names and asks for one: a right answer has to be read out of
the KV cache, so blocks that are stale, torn or foreign show as wrong answers.
"""

import asyncio
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Final

from cyclopts import Parameter
from cyclopts.validators import Number

from baton.cli.flags import JsonFlag, RouterFlag
from baton.cli.terminal import human_bytes, human_seconds, show_json, show_line, show_table, tell
from baton.client.client import DEFAULT_ROUTER, BatonClient
from baton.client.replies import Finish, Message
from baton.common.errors import BatonError
from baton.models.conversations.probes import by_decile, recall_probes
from baton.models.conversations.tasks import Recall

# A code of four digits and the end of the answer, with room to be wrong in.
MAX_ANSWER_TOKENS: Final = 8
BAR_CELLS: Final = 20
SHOWN_MISTAKES: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of one prompt: an answer with its report, or the error that ended it."""

    depth: float
    expected: str
    said: str = ""
    finish: Finish | None = None
    error: str = ""

    @property
    def is_right(self) -> bool:
        return self.finish is not None and self.said == self.expected


def recall(
    *,
    requests: Annotated[
        int, Parameter(help="prompts to send", validator=Number(gte=1, lte=100_000))
    ] = 50,
    tokens: Annotated[
        int, Parameter(help="about this many in a prompt", validator=Number(gte=1, lte=1_000_000))
    ] = 1000,
    facts: Annotated[
        int, Parameter(help="facts in a prompt", validator=Number(gte=1, lte=1000))
    ] = 8,
    concurrency: Annotated[
        int, Parameter(help="requests under way at once", validator=Number(gte=1, lte=10_000))
    ] = 8,
    seed: Annotated[int, Parameter(help="another seed, other prompts")] = 1,
    min_accuracy: Annotated[
        float, Parameter(help="exit with 1 below it", validator=Number(gte=0, lte=1))
    ] = 0.9,
    model: Annotated[str, Parameter(help="needed when several are served")] = "",
    router: RouterFlag = DEFAULT_ROUTER,
    as_json: JsonFlag = False,
) -> int:
    """Ask a cluster for facts of its prompts; meant for baton-tiny, which was trained for it."""
    probes = recall_probes(seed, requests, num_tokens=tokens, num_facts=facts)

    async def run() -> list[Answer]:
        async with BatonClient(router) as client:
            with _progress(len(probes)) as advance:
                return await ask_all(
                    client, probes, model=model, concurrency=concurrency, on_answer=advance
                )

    answers = asyncio.run(run())
    summary = summarize(answers)
    if as_json:
        show_json(summary)
    else:
        show(summary, answers)
    accuracy = summary["accuracy"]
    if accuracy < min_accuracy:
        tell(f"accuracy {accuracy:.1%} is below --min-accuracy {min_accuracy:.1%}")
        return 1
    return 0


async def ask_all(
    client: BatonClient,
    probes: Sequence[Recall],
    *,
    model: str = "",
    concurrency: int,
    on_answer: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """One answer per probe, in their order; at most `concurrency` requests are under way.

    A request that fails counts as a wrong answer; a router that cannot be reached is raised.
    """
    answers: dict[int, Answer] = {}
    waiting: Iterator[tuple[int, Recall]] = iter(enumerate(probes))

    async def ask_next() -> None:
        for index, probe in waiting:
            answers[index] = await _ask(client, probe, model)
            on_answer()

    askers = [asyncio.create_task(ask_next()) for _ in range(min(concurrency, len(probes)))]
    try:
        await asyncio.gather(*askers)
    finally:
        for asker in askers:
            asker.cancel()
        await asyncio.gather(*askers, return_exceptions=True)
    return [answers[index] for index in range(len(probes))]


async def _ask(client: BatonClient, probe: Recall, model: str) -> Answer:
    turn = probe.turns[0]
    try:
        done = await client.complete(
            [Message("user", turn.user)],
            model=model,
            max_tokens=MAX_ANSWER_TOKENS,
            temperature=0.0,
        )
    except BatonError as error:
        if error.reason == "router_unreachable":
            raise
        return Answer(depth=probe.depth, expected=turn.assistant, error=error.message)
    return Answer(depth=probe.depth, expected=turn.assistant, said=done.text, finish=done.finish)


def summarize(answers: Sequence[Answer]) -> dict[str, Any]:
    """The figures: shares, tokens, seconds, and one row per tenth of the text."""
    finishes = [answer.finish for answer in answers if answer.finish is not None]
    right = sum(answer.is_right for answer in answers)
    ttft = sorted(finish.ttft_s for finish in finishes)
    return {
        "requests": len(answers),
        "right": right,
        "accuracy": right / len(answers),
        "failed": len(answers) - len(finishes),
        "errors": Counter(answer.error for answer in answers if answer.error),
        "prompt_tokens": sum(finish.prompt_tokens for finish in finishes),
        "cached_tokens": sum(finish.cached_tokens for finish in finishes),
        "kv_bytes": sum(finish.kv_bytes for finish in finishes),
        "modes": Counter(finish.mode.value for finish in finishes),
        "ttft_p50_s": percentile(ttft, 0.5),
        "ttft_p99_s": percentile(ttft, 0.99),
        "deciles": by_decile((answer.depth, answer.is_right) for answer in answers),
    }


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of them do not exceed; None of nothing."""
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else None


def show(summary: dict[str, Any], answers: Sequence[Answer]) -> None:
    """The deciles with bars, the figures below, and the first mistakes."""
    show_table(
        ("depth of the fact", "asked", "right", "", ""),
        [
            (
                f"{10 * row.decile} to {10 * row.decile + 10} %",
                row.asked,
                row.right,
                f"{row.right / row.asked:4.0%}" if row.asked else "",
                bar(row.right / row.asked) if row.asked else "",
            )
            for row in summary["deciles"]
        ],
    )
    show_line("")
    show_table(("", ""), _figures(summary))
    for error, count in summary["errors"].items():
        tell(f"{count} failed: {error}")
    mistakes = [answer for answer in answers if answer.finish and not answer.is_right]
    for mistake in mistakes[:SHOWN_MISTAKES]:
        assert mistake.finish is not None, "failures are no mistakes"
        workers = filter(None, (mistake.finish.prefill_worker, mistake.finish.decode_worker))
        tell(
            f"wrong: {mistake.said!r} for {mistake.expected!r} at {mistake.depth:.0%}, "
            f"{' → '.join(workers)}, request {mistake.finish.request_id}"
        )


def bar(share: float) -> str:
    """A share from 0 to 1 as blocks."""
    filled = round(share * BAR_CELLS)
    return "█" * filled + "·" * (BAR_CELLS - filled)


def _figures(summary: dict[str, Any]) -> list[tuple[str, str]]:
    modes = ", ".join(f"{count} {mode}" for mode, count in summary["modes"].items())
    figures = [
        ("right", f"{summary['right']} of {summary['requests']}, {summary['accuracy']:.1%}"),
        ("modes", modes or "no answer"),
        ("prompt tokens", f"{summary['prompt_tokens']}, {summary['cached_tokens']} of them cached"),
        ("KV moved", human_bytes(summary["kv_bytes"])),
    ]
    if summary["ttft_p50_s"] is not None:
        p50, p99 = human_seconds(summary["ttft_p50_s"]), human_seconds(summary["ttft_p99_s"])
        figures.append(("time to first token", f"p50 {p50}, p99 {p99}"))
    return figures


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr while somebody watches."""
    from rich.console import Console
    from rich.progress import Progress

    is_watched = sys.stderr.isatty()
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not is_watched) as progress:
        task = progress.add_task("requests", total=total)
        yield lambda: progress.advance(task)
