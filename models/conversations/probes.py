"""Recall prompts with held-out names and codes, spread evenly over where the asked fact stands."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from baton.models.conversations import tasks
from baton.models.conversations.tasks import Recall

DECILES = 10
# A short text has facts at a few depths only: then the decile is what it happens to be.
_TRIES = 200


@dataclass(frozen=True, slots=True)
class DecileScore:
    """`right` of `asked` questions whose fact stands in this tenth of the text, the first is 0."""

    decile: int
    asked: int
    right: int


def recall_probes(seed: int, count: int, *, num_tokens: int, num_facts: int) -> list[Recall]:
    """Prompts of about `num_tokens` tokens with one question each; every tenth is of one decile."""
    rng = Random(f"recall {seed} {num_tokens} {num_facts}")
    return [
        _probe(rng, index % DECILES, num_tokens=num_tokens, num_facts=num_facts)
        for index in range(count)
    ]


def decile_of(depth: float) -> int:
    """The tenth of the text, 0 to 9, in which `depth` from 0 to 1 lies."""
    return min(DECILES - 1, int(depth * DECILES))


def by_decile(answers: Iterable[tuple[float, bool]]) -> list[DecileScore]:
    """All ten deciles of (depth, whether the answer was right)."""
    asked: Counter[int] = Counter()
    right: Counter[int] = Counter()
    for depth, is_right in answers:
        asked[decile_of(depth)] += 1
        right[decile_of(depth)] += is_right
    return [DecileScore(decile, asked[decile], right[decile]) for decile in range(DECILES)]


def _probe(rng: Random, decile: int, *, num_tokens: int, num_facts: int) -> Recall:
    for _ in range(_TRIES):
        found = tasks.recall(
            rng, num_tokens=num_tokens, num_facts=num_facts, num_questions=1, held_out=True
        )
        if decile_of(found.depth) == decile:
            break
    return found
