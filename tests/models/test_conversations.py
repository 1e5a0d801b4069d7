"""The conversations: right answers by other means, what is held out, depths and lengths."""

import json
import re
from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest
from support.house import ROOT

from baton.models.conversations import filler, tasks, words
from baton.models.conversations.probes import DECILES, by_decile, decile_of, recall_probes
from baton.models.conversations.tasks import Turn
from baton.models.training.tokens import encode_prompt, load_tokenizer

MODEL = ROOT / "models" / "baton_tiny"
SAMPLES = 200


def facts_in(text: str) -> dict[str, str]:
    return dict(re.findall(r"code for (\w+) is (\d{4})\.", text))


def listed(text: str) -> list[str]:
    """What stands after the colon, up to the full stop."""
    return text.partition(": ")[2].removesuffix(".").split(", ")


def asked_name(question: str) -> str:
    return re.findall(r"(\w+)[?.]$", question)[0]


def is_right_list(turn: Turn, order: Callable[[list[str]], list[str]]) -> bool:
    return turn.assistant.split(", ") == order(listed(turn.user))


def is_right_count(turn: Turn) -> bool:
    first, last = map(int, re.findall(r"\d+", turn.user))
    numbers = [int(number) for number in turn.assistant.split(", ")]
    steps = {after - before for before, after in pairwise(numbers)}
    return numbers[0] == first and numbers[-1] == last and steps == {1}


def is_right_sum(turn: Turn, sign: int) -> bool:
    first, second = map(int, re.findall(r"\d+", turn.user))
    return int(turn.assistant) - first == sign * second


def is_right_cell(turn: Turn) -> bool:
    _, *rows, question = turn.user.splitlines()
    cells = {item: (color, price) for item, color, price in (row.split(" | ") for row in rows)}
    color, price = cells[asked_name(question)]
    return turn.assistant == (color if "color" in question else price)


CHECKS: dict[tasks.Maker, Callable[[Turn], bool]] = {
    tasks.copy: lambda turn: is_right_list(turn, list),
    tasks.reverse: lambda turn: is_right_list(turn, lambda items: items[::-1]),
    tasks.sort: lambda turn: is_right_list(turn, sorted),
    tasks.count: is_right_count,
    tasks.add: lambda turn: is_right_sum(turn, 1),
    tasks.subtract: lambda turn: is_right_sum(turn, -1),
    tasks.look_up: is_right_cell,
    tasks.small_talk: lambda turn: turn.assistant.endswith((".", "?", "!")),
}


@pytest.mark.parametrize("make", tasks.SHORT, ids=lambda make: make.__name__)
def test_short_answers_are_right(make: tasks.Maker) -> None:
    rng = Random(5)
    for _ in range(SAMPLES):
        (turn,) = make(rng)
        assert CHECKS[make](turn), turn


@pytest.mark.parametrize("held_out", [False, True])
def test_recall_asks_for_facts_of_its_text(held_out: bool) -> None:
    rng = Random(6)
    for _ in range(SAMPLES):
        found = tasks.recall(rng, num_tokens=400, num_facts=8, num_questions=3, held_out=held_out)
        facts = facts_in(found.turns[0].user)
        assert len(facts) == 8
        assert len(found.turns) == len({asked_name(turn.user) for turn in found.turns}) == 3
        for turn in found.turns:
            assert turn.assistant == facts[asked_name(turn.user)]
        assert all(words.is_held_out(word) == held_out for pair in facts.items() for word in pair)


def test_a_later_turn_asks_for_a_fact_of_the_first() -> None:
    rng = Random(7)
    for _ in range(SAMPLES):
        first, *_, last = tasks.multi_turn(rng, held_out=True)
        assert last.assistant == facts_in(first.user)[asked_name(last.user)]


def test_json_holds_the_facts() -> None:
    rng = Random(8)
    for _ in range(SAMPLES):
        (turn,) = tasks.as_json(rng, held_out=True)
        told = {name: int(code) for name, code in facts_in(turn.user).items()}
        assert json.loads(turn.assistant) == told
        assert all(words.is_held_out(name) for name in told)


def test_training_never_says_what_is_held_out() -> None:
    rng = Random(9)
    makers: list[Callable[[Random], list[Turn]]] = [
        *tasks.SHORT,
        tasks.multi_turn,
        tasks.as_json,
        lambda rng: tasks.recall(rng, num_tokens=300, num_facts=8, num_questions=2).turns,
    ]
    names, codes = set(words.THINGS), re.compile(r"\b[1-9]\d{3}\b")
    for make in makers:
        for _ in range(SAMPLES):
            # A sum may come to any number, also to one that is held out as a code.
            turns = [turn for turn in make(rng) if not re.match(r"Add|What is \d", turn.user)]
            text = " ".join(f"{turn.user} {turn.assistant}" for turn in turns)
            told = {*facts_in(text), *codes.findall(text)}
            told |= names & set(re.findall(r"[a-z]+", text))
            assert not {word for word in told if words.is_held_out(word)}, text


def test_a_fifth_of_names_and_codes_is_held_out() -> None:
    codes = [str(code) for code in range(1000, 10_000)]
    assert 0.18 < sum(map(words.is_held_out, codes)) / len(codes) < 0.22
    rng = Random(10)
    made_up = {words.name(rng, held_out=True) for _ in range(2000)}
    assert made_up.isdisjoint(words.THINGS)
    assert len(made_up) > 1000, "held-out names are many"
    assert all(not words.is_held_out(word) for word in words.LIST_WORDS)


def test_filler_holds_numbers_that_look_like_codes() -> None:
    rng = Random(11)
    numbers = re.findall(r"\d+", " ".join(filler.sentence(rng) for _ in range(SAMPLES)))
    assert SAMPLES / 5 < len(numbers) < SAMPLES / 1.5
    assert any(len(number) == 4 for number in numbers)


def test_probes_are_spread_evenly_and_repeat() -> None:
    probes = recall_probes(3, 40, num_tokens=600, num_facts=8)
    assert all(0 <= probe.depth < 1 for probe in probes)
    assert [decile_of(probe.depth) for probe in probes] == [*range(DECILES)] * 4
    for probe in probes:
        before = probe.turns[0].user.index(f" {asked_name(probe.turns[0].user)} is ")
        assert before / len(probe.turns[0].user) == pytest.approx(probe.depth, abs=0.05)
    assert recall_probes(3, 40, num_tokens=600, num_facts=8) == probes
    assert recall_probes(4, 40, num_tokens=600, num_facts=8) != probes


def test_a_text_of_facts_alone_still_makes_probes() -> None:
    probes = recall_probes(1, 12, num_tokens=1, num_facts=1)
    assert len(probes) == 12
    assert all(len(facts_in(probe.turns[0].user)) == 1 for probe in probes)


def test_deciles_count_what_was_asked_and_right() -> None:
    scores = by_decile([(0.0, True), (0.09, False), (0.95, True), (1.0, True)])
    assert [(score.asked, score.right) for score in scores] == [(2, 1), *[(0, 0)] * 8, (2, 2)]


@pytest.mark.parametrize(("num_tokens", "num_facts"), [(200, 8), (1000, 8), (3000, 24)])
def test_prompts_are_about_as_long_as_asked(num_tokens: int, num_facts: int) -> None:
    tokenizer = load_tokenizer(MODEL)
    for probe in recall_probes(2, 10, num_tokens=num_tokens, num_facts=num_facts):
        assert len(encode_prompt(tokenizer, probe.turns)) == pytest.approx(num_tokens, rel=0.25)
