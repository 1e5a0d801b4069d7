"""Rows of training: one long conversation each, its turns of all kinds, made in many processes."""

from collections.abc import Sequence
from random import Random

import numpy as np
from tokenizers import Tokenizer

from baton.models.conversations import tasks
from baton.models.conversations.tasks import Turn
from baton.models.training.tokens import BEGIN_ID, END_ID, encode_turns

# Tasks that need more practice are drawn more often.
_DRAWN = (
    *(tasks.add, tasks.add, tasks.add, tasks.subtract, tasks.subtract),
    *(tasks.sort, tasks.sort, tasks.copy, tasks.reverse, tasks.count),
    *(tasks.look_up, tasks.look_up, tasks.small_talk),
    *(tasks.multi_turn, tasks.multi_turn),
    # Names lose their leading space in JSON, and with it their tokens: much to learn.
    *([tasks.as_json] * 7),
)


def conversation(rng: Random, num_tokens: int) -> list[Turn]:
    """Turns for about `num_tokens` tokens; half begin with a recall of any length that fits."""
    turns: list[Turn] = []
    left = num_tokens
    if rng.random() < 0.5:
        longest = max(60, num_tokens - 200)
        size = rng.randint(50, longest) if rng.random() < 0.7 else longest
        num_facts = rng.randint(2, max(3, min(24, size // 30)))
        questions = rng.randint(1, 8) if num_tokens < 1000 else rng.randint(4, 16)
        found = tasks.recall(rng, num_tokens=size, num_facts=num_facts, num_questions=questions)
        turns += found.turns
        left -= size + 18 * len(found.turns)
    while left > 0:
        made = rng.choice(_DRAWN)(rng)
        turns += made
        left -= sum(len(turn.user) + len(turn.assistant) for turn in made) // 3
    return turns


def batch(
    rng: Random, tokenizer: Tokenizer, num_rows: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids uint16 [rows, length + 1] and the mask uint8 [rows, length] of learned targets."""
    ids = np.full((num_rows, length + 1), END_ID, dtype=np.uint16)
    learned = np.zeros((num_rows, length), dtype=np.uint8)
    for row in range(num_rows):
        tokens, mask = encode_turns(tokenizer, conversation(rng, length))
        fill_row(ids[row], learned[row], tokens, mask)
    return ids, learned


def fill_row(
    ids: np.ndarray, learned: np.ndarray, tokens: Sequence[int], mask: Sequence[int]
) -> None:
    """`<|begin|>` and the tokens as far as they fit; the mask marks targets, one place earlier."""
    fitting = min(len(tokens), len(ids) - 1)
    ids[0] = BEGIN_ID
    ids[1 : fitting + 1] = tokens[:fitting]
    learned[:fitting] = mask[:fitting]
