"""All text together equals decode(prompt + output) without decode(prompt)."""

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_model import byte_fallback_tokenizer, byte_level_tokenizer
from tokenizers import Tokenizer

from baton.router.detokenizer import REPLACEMENT, Detokenizer

BYTE_LEVEL = byte_level_tokenizer(with_bos=False)
FALLBACK = byte_fallback_tokenizer()
SAMPLES = "Hello world 🌶🧑‍🚀 中文字 สวัสดี é\ufffd ok"
TEXTS = st.text(st.sampled_from(SAMPLES), max_size=24)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def pieces(ids: list[int], sizes: list[int]) -> list[list[int]]:
    source = iter(ids)
    cut = [list(islice(source, size)) for size in sizes]
    return [*cut, list(source)]


def stream(tokenizer: Tokenizer, prompt: list[int], cuts: list[list[int]]) -> str:
    detokenizer = Detokenizer(tokenizer, prompt)
    return "".join([*(detokenizer.push(cut) for cut in cuts), detokenizer.flush()])


def expected(tokenizer: Tokenizer, prompt: list[int], output: list[int]) -> str:
    """What a reader of the decoded prompt has not seen yet.

    U+FFFD at the prompt's end stands for unfinished characters: those that the output completes
    are the output's, those that still stand were seen.
    """
    shown, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + output)
    settled = shown.rstrip(REPLACEMENT)
    assert whole.startswith(settled)
    rest = whole[len(settled) :]
    for _ in range(len(shown) - len(settled)):
        rest = rest.removeprefix(REPLACEMENT)
    return rest


@given(text=TEXTS, border=st.integers(0, 60), sizes=st.lists(st.integers(0, 5), max_size=30))
def test_byte_level_equals_the_whole(text: str, border: int, sizes: list[int]) -> None:
    ids = ids_of(BYTE_LEVEL, "x" + text)
    border = min(1 + border, len(ids))
    prompt, output = ids[:border], ids[border:]
    assert stream(BYTE_LEVEL, prompt, pieces(output, sizes)) == expected(BYTE_LEVEL, prompt, output)


@given(
    text=st.text(st.sampled_from("ab Hello world🌶中é"), max_size=20),
    border=st.integers(0, 10),
    sizes=st.lists(st.integers(0, 4), max_size=20),
)
def test_byte_fallback_equals_the_whole_on_whole_characters(
    text: str, border: int, sizes: list[int]
) -> None:
    prompt = ids_of(FALLBACK, "a" + text[:border])
    output = ids_of(FALLBACK, text[border:])
    assert stream(FALLBACK, prompt, pieces(output, sizes)) == expected(FALLBACK, prompt, output)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_a_prompt_that_ends_inside_a_character_does_not_leak(kept: int) -> None:
    prefix = ids_of(BYTE_LEVEL, "Hello world ")
    chili = ids_of(BYTE_LEVEL, "🌶")
    assert len(chili) == 4
    prompt = prefix + chili[:kept]
    detokenizer = Detokenizer(BYTE_LEVEL, prompt)
    texts = [detokenizer.push([token]) for token in chili[kept:]]
    assert texts == [""] * (3 - kept) + ["🌶"]


@given(garbage=st.lists(st.integers(0, 255), max_size=60))
def test_no_bytes_make_it_raise_or_hold_for_ever(garbage: list[int]) -> None:
    """Invalid UTF-8 in a byte-fallback vocabulary is where DecodeStream gives up."""
    detokenizer = Detokenizer(FALLBACK, ids_of(FALLBACK, "Hello"))
    first_byte = FALLBACK.token_to_id("<0x00>")
    for byte in garbage:
        detokenizer.push([first_byte + byte])
    detokenizer.flush()
    assert detokenizer.push(ids_of(FALLBACK, "ok!")) + detokenizer.flush() == "ok!"


def test_an_emitted_byte_that_turns_invalid_in_hindsight_is_survived() -> None:
    e_acute = [FALLBACK.token_to_id("<0xC3>"), FALLBACK.token_to_id("<0xA9>")]
    lone = [FALLBACK.token_to_id("<0xE2>")]
    word = [FALLBACK.token_to_id("▁world")]
    cuts = [e_acute, lone, word, word]
    text = stream(FALLBACK, ids_of(FALLBACK, "a"), cuts)
    assert text.startswith("é")
    assert text.endswith(" world world")


def test_special_tokens_have_no_text() -> None:
    end = BYTE_LEVEL.token_to_id("<|im_end|>")
    output = [*ids_of(BYTE_LEVEL, " fine"), end, *ids_of(BYTE_LEVEL, ", thank you")]
    assert stream(BYTE_LEVEL, ids_of(BYTE_LEVEL, "I am"), [[one] for one in output]) == (
        " fine, thank you"
    )


def test_a_prompt_of_special_tokens_alone_gives_no_text() -> None:
    start = BYTE_LEVEL.token_to_id("<|im_start|>")
    output = ids_of(BYTE_LEVEL, "Hello 🌶")
    assert stream(BYTE_LEVEL, [start] * 9, [[one] for one in output]) == "Hello 🌶"


def test_spaces_before_words_survive_at_the_border() -> None:
    prompt = ids_of(FALLBACK, "a")
    words = [FALLBACK.token_to_id("▁Hello"), FALLBACK.token_to_id("▁world")]
    assert stream(FALLBACK, prompt, [[words[0]], [words[1]]]) == " Hello world"
