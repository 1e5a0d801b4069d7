"""`make demo`: a whole cluster on this machine, and one talk of two turns through it.

router → prefill worker → KV by NIXL → decode worker. The second turn repeats the first, so that its
prompt is found in the caches. Everything is stopped at the end.
"""

import asyncio
import sys

from baton.cli.cluster import Cluster
from baton.cli.complete import what_it_took
from baton.cli.terminal import show_line, show_text, tell, tell_table
from baton.cli.up import make_plan, tell_output
from baton.client import BatonClient, Finish, Message
from baton.common.errors import BatonError

TURNS = (
    "In a relay race four runners carry one baton, and the exchange decides who wins: the next "
    "runner is at full speed before the hand-over, and nothing may be dropped on the way. "
    "Tell me how such a team trains.",
    "And what do they do in the rain?",
)
ANSWER_TOKENS = 48


async def demo() -> None:
    cluster = Cluster(
        make_plan(None, flags={"http_port": 0, "grpc_port": 0, "admin_port": 0}),
        show_line=tell_output,
        say=tell,
    )
    try:
        await cluster.start()
        finishes = await talk(cluster.endpoints.grpc)
    finally:
        tell("stopping")
        await cluster.stop()
    steps = [what_it_took(finish) for finish in finishes]
    rows = [(name, *(dict(step)[name] for step in steps)) for name, _ in steps[0]]
    tell_table(("", "first turn", "second turn"), rows, title="What happened")


async def talk(router: str) -> list[Finish]:
    """Both turns, streamed to the terminal."""
    messages: list[Message] = []
    finishes: list[Finish] = []
    async with BatonClient(router) as client:
        for text in TURNS:
            messages.append(Message("user", text))
            show_line(f"\nuser: {text}\n\nassistant: ")
            pieces = []
            async for chunk in client.generate(
                messages, max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True
            ):
                pieces.append(chunk.text)
                show_text(chunk.text)
                if chunk.finish is not None:
                    finishes.append(chunk.finish)
            messages.append(Message("assistant", "".join(pieces)))
            show_text("\n\n")
    return finishes


if __name__ == "__main__":
    try:
        asyncio.run(demo())
    except BatonError as error:
        sys.exit(f"error: {error.message}")
