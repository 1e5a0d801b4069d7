"""`make demo`: a whole cluster on this machine, and a conversation with baton-tiny through it.

router → prefill worker → KV by NIXL → decode worker. What the model is asked stands in what it has
read, so each answer is right or wrong: KV that is stale, torn or foreign would show. The later
turns find what was said before in the prefix cache. Everything is stopped at the end.
"""

import asyncio
import sys
from random import Random

from baton.cli.cluster import Cluster
from baton.cli.terminal import (
    counted,
    human_bytes,
    human_seconds,
    show_line,
    show_table,
    show_text,
    tell,
)
from baton.cli.up import make_plan, tell_output
from baton.client import BatonClient, Finish, Message
from baton.common.errors import BatonError
from baton.models.conversations import tasks
from baton.models.conversations.tasks import Turn

SEED = 4821
TEXT_TOKENS = 1000
NUM_FACTS = 12
ANSWER_TOKENS = 64
# Of a long text, its start and its end are shown.
SHOWN_CHARACTERS = 160


def conversation() -> list[Turn]:
    """A greeting, a text with facts, questions about two of them, and a sum.

    Names and codes are ones that training never saw.
    """
    rng = Random(SEED)
    recall = tasks.recall(
        rng, num_tokens=TEXT_TOKENS, num_facts=NUM_FACTS, num_questions=2, held_out=True
    )
    greeting = Turn("Hello!", "Hello! How can I help you?")
    return [greeting, *recall.turns, *tasks.add(rng, digits=3)]


async def demo() -> bool:
    """Whether all answers were right."""
    cluster = Cluster(
        make_plan(None, flags={"http_port": 0, "grpc_port": 0, "admin_port": 0}),
        show_line=tell_output,
        say=tell,
    )
    turns = conversation()
    try:
        await cluster.start()
        async with BatonClient(cluster.endpoints.grpc) as client:
            finishes, num_right = await talk(client, turns)
    finally:
        tell("stopping")
        await cluster.stop()
    show_what_happened(finishes)
    show_line(f"{num_right} of {len(turns)} answers are right")
    return num_right == len(turns)


async def talk(client: BatonClient, turns: list[Turn]) -> tuple[list[Finish], int]:
    """All turns, streamed to the terminal, and how many answers were right."""
    messages: list[Message] = []
    finishes: list[Finish] = []
    num_right = 0
    for turn in turns:
        messages.append(Message("user", turn.user))
        show_line(f"\nuser: {await shown(client, turn.user)}")
        show_text("assistant: ")
        pieces = []
        async for chunk in client.generate(messages, max_tokens=ANSWER_TOKENS, temperature=0.0):
            pieces.append(chunk.text)
            show_text(chunk.text)
            if chunk.finish is not None:
                finishes.append(chunk.finish)
        answer = "".join(pieces)
        is_right = answer == turn.assistant
        num_right += is_right
        show_line("  ✓" if is_right else f"  ✗ it should have been {turn.assistant!r}")
        messages.append(Message("assistant", answer))
    return finishes, num_right


async def shown(client: BatonClient, text: str) -> str:
    """The text; of a long one, how it begins and ends, and what is between."""
    if len(text) <= 2 * SHOWN_CHARACTERS:
        return text
    num_tokens = len(await client.tokenize(text))
    between = f"[… {num_tokens:,} tokens in all, {NUM_FACTS} codes among them …]"
    return f"{text[:SHOWN_CHARACTERS]} {between} {text[-SHOWN_CHARACTERS:]}"


def show_what_happened(finishes: list[Finish]) -> None:
    last = finishes[-1]
    show_line(f"\n{last.prefill_worker} → KV by {last.transport} → {last.decode_worker}\n")
    columns = (
        "turn",
        "prompt tokens",
        "cached",
        "computed",
        "KV moved",
        "first token",
        "each next",
    )
    rows = [
        (
            index + 1,
            finish.prompt_tokens,
            finish.cached_tokens,
            finish.prefill_computed_tokens,
            f"{human_bytes(finish.kv_bytes)} in {counted(finish.kv_blocks, 'block')}",
            human_seconds(finish.ttft_s),
            human_seconds(finish.tpot_s),
        )
        for index, finish in enumerate(finishes)
    ]
    show_table(columns, rows)
    prompt = sum(finish.prompt_tokens for finish in finishes)
    cached = sum(finish.cached_tokens for finish in finishes)
    show_line(f"\n{cached:,} of {prompt:,} prompt tokens were served from the prefix cache")


if __name__ == "__main__":
    try:
        sys.exit(0 if asyncio.run(demo()) else 1)
    except BatonError as error:
        sys.exit(f"error: {error.message}")
