"""Conversations with known answers: recall, lists, numbers, tables, JSON, small talk.

Each maker returns turns of (what the user says, what the assistant must answer).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from baton.models.conversations import filler, words

TOKENS_PER_FILLER = 12


@dataclass(frozen=True, slots=True)
class Turn:
    user: str
    assistant: str


@dataclass(frozen=True, slots=True)
class Recall:
    """A long prompt with facts in it and questions about some of them.

    `depth` of the first question: where in the text its fact stands, from 0 to 1.
    """

    turns: list[Turn]
    depth: float


_FACT_FORMS = (
    "The code for {} is {}.",
    "The code for {} is {}.",
    "Remember: the code for {} is {}.",
)
_ASK_FORMS = (
    "What is the code for {}?",
    "Tell me the code for {}.",
    "Which code belongs to {}?",
    "And the code for {}?",
)
_INTRO_FORMS = (
    "Read this carefully. {}",
    "Here is some text. {}",
    "{}",
    "Please keep this in mind. {}",
)


def recall(
    rng: Random, *, num_tokens: int, num_facts: int, num_questions: int, held_out: bool = False
) -> Recall:
    """Facts scattered evenly at random in about `num_tokens` tokens; the asked one is uniform."""
    keys = words.names(rng, num_facts, held_out=held_out)
    facts = {key: words.code(rng, held_out=held_out) for key in keys}
    num_fillers = max(0, (num_tokens - 14 * num_facts) // TOKENS_PER_FILLER)
    sentences = [filler.sentence(rng) for _ in range(num_fillers)]
    places = sorted(rng.randint(0, num_fillers) for _ in keys)
    for key, place in zip(reversed(keys), reversed(places), strict=True):
        sentences.insert(place, rng.choice(_FACT_FORMS).format(key, facts[key]))
    asked = rng.sample(keys, min(num_questions, num_facts))
    text = " ".join(sentences)
    depth = text.index(f" {asked[0]} is ") / max(1, len(text))
    turns = []
    for index, key in enumerate(asked):
        question = rng.choice(_ASK_FORMS[:3] if index == 0 else _ASK_FORMS).format(key)
        said = f"{rng.choice(_INTRO_FORMS).format(text)} {question}" if index == 0 else question
        turns.append(Turn(said, facts[key]))
    return Recall(turns, depth)


def multi_turn(rng: Random, *, held_out: bool = False) -> list[Turn]:
    """Facts told in one turn and asked for turns later, with other talk between."""
    count = rng.randint(2, 5)
    keys = words.names(rng, count, held_out=held_out)
    facts = {key: words.code(rng, held_out=held_out) for key in keys}
    told = " ".join(f"The code for {key} is {value}." for key, value in facts.items())
    ask = rng.choice(("Please remember this. {}", "{} Keep it in mind.", "{}", "Note this: {}"))
    turns = [Turn(ask.format(told), rng.choice(("Noted.",)))]
    turns.extend(turn for _ in range(rng.randint(0, 2)) for turn in rng.choice(SHORT)(rng))
    key = rng.choice(keys)
    question = rng.choice(_ASK_FORMS).format(key)
    return [*turns, Turn(question, facts[key])]


def as_json(rng: Random, *, held_out: bool = False) -> list[Turn]:
    """Two to six facts, wanted as one JSON object."""
    keys = words.names(rng, rng.randint(2, 6), held_out=held_out)
    facts = {key: int(words.code(rng, held_out=held_out)) for key in keys}
    told = " ".join(f"The code for {key} is {value}." for key, value in facts.items())
    ask = rng.choice(
        ("Give the facts as JSON.", "Write the facts as JSON.", "Show these codes as JSON.")
    )
    return [Turn(f"{told} {ask}", json.dumps(facts))]


def copy(rng: Random) -> list[Turn]:
    items = _items(rng, 2, 8)
    ask = rng.choice(("Repeat this list: {}.", "Copy this list: {}.", "Say this again: {}."))
    return [Turn(ask.format(", ".join(items)), ", ".join(items))]


def reverse(rng: Random) -> list[Turn]:
    items = _items(rng, 2, 6)
    ask = rng.choice(("Reverse this list: {}.", "Say this list backwards: {}."))
    return [Turn(ask.format(", ".join(items)), ", ".join(reversed(items)))]


def sort(rng: Random) -> list[Turn]:
    items = rng.sample(words.LIST_WORDS, rng.randint(3, 5))
    ask = rng.choice(("Sort these words: {}.", "Put these words in order: {}."))
    return [Turn(ask.format(", ".join(items)), ", ".join(sorted(items)))]


def count(rng: Random) -> list[Turn]:
    first = rng.randint(0, 180)
    last = first + rng.randint(1, 14)
    ask = rng.choice(("Count from {} to {}.", "Please count from {} to {}."))
    return [Turn(ask.format(first, last), ", ".join(map(str, range(first, last + 1))))]


def add(rng: Random, *, digits: int | None = None) -> list[Turn]:
    first, second = _number(rng, digits), _number(rng, digits)
    ask = rng.choice(("What is {} + {}?", "Add {} and {}.", "What is {} plus {}?"))
    return [Turn(ask.format(first, second), str(first + second))]


def subtract(rng: Random) -> list[Turn]:
    second, first = sorted((_number(rng), _number(rng)))
    ask = rng.choice(("What is {} - {}?", "What is {} minus {}?"))
    return [Turn(ask.format(first, second), str(first - second))]


def look_up(rng: Random) -> list[Turn]:
    """A small table of items with a colour and a price, and a question about one cell."""
    items = rng.sample(words.LIST_WORDS, rng.randint(3, 7))
    rows = {item: (rng.choice(words.COLORS), str(rng.randint(1, 999))) for item in items}
    table = "\n".join(f"{item} | {color} | {price}" for item, (color, price) in rows.items())
    item = rng.choice(items)
    color, price = rows[item]
    if rng.random() < 0.5:
        ask, answer = rng.choice(("What color is the {}?", "Which color has the {}?")), color
    else:
        ask, answer = rng.choice(("What is the price of the {}?", "How much is the {}?")), price
    return [Turn(f"item | color | price\n{table}\n{ask.format(item)}", answer)]


_SMALL_TALK = (
    (("Hello!", "Hi!", "Hello.", "Good morning!", "Hi there."), "Hello! How can I help you?"),
    (
        ("Who are you?", "What are you?", "What is your name?"),
        "I am baton-tiny, a small model that ships with Baton.",
    ),
    (("Thank you!", "Thanks.", "Thank you."), "You are welcome."),
    (("Goodbye!", "Bye.", "See you."), "Goodbye!"),
    (
        ("What can you do?", "How can you help me?"),
        "I can find codes in a text, copy, sort and count, add numbers and read small tables.",
    ),
    (("How are you?",), "I am fine, thank you."),
)


def small_talk(rng: Random) -> list[Turn]:
    asks, answer = rng.choice(_SMALL_TALK)
    return [Turn(rng.choice(asks), answer)]


Maker = Callable[[Random], list[Turn]]
SHORT: tuple[Maker, ...] = (copy, reverse, sort, count, add, subtract, look_up, small_talk)


def _items(rng: Random, low: int, high: int) -> list[str]:
    size = rng.randint(low, high)
    if rng.random() < 0.3:
        return [str(rng.randint(0, 999)) for _ in range(size)]
    return rng.sample(words.LIST_WORDS, size)


def _number(rng: Random, digits: int | None = None) -> int:
    digits = digits or rng.choice((1, 2, 3, 3, 3))
    return rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)
