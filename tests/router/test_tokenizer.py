"""Encoding, BOS, and control-token strings inside user text."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_model import SPECIAL_TOKENS, byte_level_tokenizer, tiny_model, write_model_folder

from baton.common.errors import InvalidRequest, ModelError
from baton.router.intake import ChatPrompt, tokenize
from baton.router.served_model import ServedModel
from baton.router.tokenizer import ModelTokenizer

BOS, EOS, IM_START, IM_END = range(4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return tiny_model(tmp_path_factory.mktemp("model"))


async def chat_ids(model: ServedModel, *contents: str) -> list[int]:
    messages: list[dict[str, Any]] = [{"role": "user", "content": one} for one in contents]
    return await tokenize(model, ChatPrompt(messages))


def test_bos_is_added_once(model: ServedModel) -> None:
    tokenizer = model.tokenizer
    plain = tokenizer.encode("Hello", add_special_tokens=True)
    assert plain[0] == BOS
    assert tokenizer.encode("<s>Hello", add_special_tokens=True) == plain
    assert tokenizer.encode("Hello", add_special_tokens=False) == plain[1:]


def test_raw_text_may_write_control_tokens(model: ServedModel) -> None:
    assert IM_END in model.tokenizer.encode("a<|im_end|>b", add_special_tokens=True)


async def test_chat_equals_the_plain_encoding_without_control_text(model: ServedModel) -> None:
    rendered = "<|im_start|>user\nHello 🌶<|im_end|>\n<|im_start|>assistant\n"
    expected = model.tokenizer.raw.encode(rendered, add_special_tokens=False).ids
    assert await chat_ids(model, "Hello 🌶") == expected


@given(text=st.lists(st.sampled_from([*SPECIAL_TOKENS, "a", " b", "<|", "\U000f0000"]), max_size=8))
async def test_a_message_cannot_write_control_tokens(model: ServedModel, text: list[str]) -> None:
    content = "".join(text)
    ids = await chat_ids(model, content, "second")
    assert [token for token in ids if token < len(SPECIAL_TOKENS)] == [
        *(IM_START, IM_END) * 2,
        IM_START,
    ]
    shown = model.tokenizer.decode(ids)
    assert shown == (
        f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>user\nsecond<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


async def test_long_texts_are_encoded_the_same(model: ServedModel) -> None:
    text = "Hello world " * 2000
    ids = await chat_ids(model, text)
    assert text in model.tokenizer.decode(ids)


async def test_surrogates_are_refused_and_nul_is_not(model: ServedModel) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        model.tokenizer.encode("a\ud800", add_special_tokens=True)
    with pytest.raises(InvalidRequest, match=r"messages\[0\].content"):
        await chat_ids(model, "\udfff")
    assert model.tokenizer.decode(await chat_ids(model, "\0")).count("\0") == 1


def test_saved_truncation_and_padding_are_off(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=100)
    write_model_folder(tmp_path, tokenizer=tokenizer)
    assert 10 < len(ModelTokenizer(tmp_path).encode("xyzw" * 5, add_special_tokens=True)) < 100


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json: no such file"):
        ModelTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        ModelTokenizer(tmp_path)
    write_model_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
        ModelTokenizer(tmp_path)
