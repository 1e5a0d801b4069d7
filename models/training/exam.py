"""The exam: fresh prompts of each task with held-out names and codes, answered greedily.

The answer is judged as text generated greedily would be: the model's first choice must be right at
each place of the answer and at its end.
"""

from collections.abc import Callable
from random import Random

from baton.models.conversations import tasks
from baton.models.conversations.tasks import Turn

# Tokens and facts of the recall tasks.
RECALLS = {
    "recall, 200 tokens": (200, 8),
    "recall, 1,000 tokens": (1000, 8),
    "recall, 3,000 tokens": (3000, 24),
}


def _recall(num_tokens: int, num_facts: int) -> Callable[[Random], list[Turn]]:
    return lambda rng: (
        tasks.recall(
            rng, num_tokens=num_tokens, num_facts=num_facts, num_questions=1, held_out=True
        ).turns
    )


# Task to (maker of the conversation whose last answer is judged, accuracy to reach).
EXAM: dict[str, tuple[Callable[[Random], list[Turn]], float]] = {
    "recall, 200 tokens": (_recall(*RECALLS["recall, 200 tokens"]), 0.98),
    "recall, 1,000 tokens": (_recall(*RECALLS["recall, 1,000 tokens"]), 0.98),
    "recall, 3,000 tokens": (_recall(*RECALLS["recall, 3,000 tokens"]), 0.90),
    "multi-turn recall": (lambda rng: tasks.multi_turn(rng, held_out=True), 0.95),
    "JSON": (lambda rng: tasks.as_json(rng, held_out=True), 0.90),
    "copy": (tasks.copy, 0.95),
    "reverse": (tasks.reverse, 0.90),
    "sort": (tasks.sort, 0.95),
    "count": (tasks.count, 0.95),
    "look-up": (tasks.look_up, 0.95),
    "add, three digits": (lambda rng: tasks.add(rng, digits=3), 0.90),
    "subtract": (tasks.subtract, 0.90),
    "small talk": (tasks.small_talk, 0.95),
}
