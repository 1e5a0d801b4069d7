"""The model that ships: a whole folder, the same in transformers, and answers that are right."""

import json
from random import Random

import pytest
import torch
from safetensors import safe_open
from support.house import ROOT
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from baton.common.sampling import SamplingParams
from baton.engine.llm import LLM
from baton.engine.sequence import Chunk
from baton.models.conversations import tasks
from baton.models.training.evaluate import Score, evaluate_task, matches, open_model
from baton.models.training.exam import EXAM
from baton.models.training.tokens import SPECIAL, encode_prompt, load_tokenizer

MODEL = ROOT / "models" / "baton_tiny"
MAX_BYTES = 12 * 10**6
CHEAP = [task for task in EXAM if "," not in task or "digits" in task]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return open_model(MODEL)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(MODEL)


def test_the_folder_is_whole_and_small() -> None:
    names = {path.name for path in MODEL.iterdir()}
    assert names == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (MODEL / "model.safetensors").stat().st_size <= MAX_BYTES
    config = json.loads((MODEL / "config.json").read_text())
    assert config["max_position_embeddings"] >= 4096
    assert config["num_hidden_layers"] >= 4
    assert config["num_attention_heads"] > config["num_key_value_heads"] >= 2
    with safe_open(MODEL / "model.safetensors", "pt") as weights:
        kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    assert kinds == {"BF16"}


def test_digits_are_tokens_of_their_own(tokenizer: Tokenizer) -> None:
    assert [tokenizer.id_to_token(index) for index in range(4)] == list(SPECIAL)
    for digit in "0123456789":
        assert len(tokenizer.encode(digit).ids) == 1
    assert len(tokenizer.encode("4821").ids) == 4
    longer = [token for token in tokenizer.get_vocab() if len(token) > 1 and not token.isalpha()]
    assert not [token for token in longer if any(char.isdigit() for char in token)]


def test_the_template_renders_what_training_read(tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(MODEL)
    rng = Random(1)
    for turns in (tasks.multi_turn(rng), tasks.as_json(rng), tasks.look_up(rng)):
        messages = [
            message
            for turn in turns
            for message in (
                {"role": "user", "content": turn.user},
                {"role": "assistant", "content": turn.assistant},
            )
        ]
        text = theirs.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        expected = encode_prompt(tokenizer, turns)
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected
        assert theirs(text, add_special_tokens=False)["input_ids"] == expected


def test_transformers_computes_the_same(llm: LLM, tokenizer: Tokenizer) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    turns = tasks.recall(Random(2), num_tokens=300, num_facts=8, num_questions=1).turns
    prompt = encode_prompt(tokenizer, turns)
    with torch.no_grad():
        expected = theirs(torch.tensor([prompt])).logits[0, -1]
    sampling = SamplingParams(max_tokens=8, temperature=0.0)
    sequence = llm.engine.new_sequence(prompt, sampling, b"")
    assert llm.engine.kv.reserve(sequence, len(prompt), len(prompt) - 1)
    ours = llm.engine.runner.prepare([Chunk(sequence, len(prompt))])()[0]
    llm.engine.kv.release(sequence)
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)
    answered = theirs.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
    (done,) = llm.generate([prompt], sampling)
    assert done.token_ids == answered[0, len(prompt) :].tolist()
    assert done.text == turns[-1].assistant


@pytest.mark.parametrize("task", CHEAP)
def test_it_passes_a_small_exam(llm: LLM, tokenizer: Tokenizer, task: str) -> None:
    score = evaluate_task(llm, tokenizer, task, count=12)
    assert score.accuracy >= score.target, score


def test_it_finds_facts_in_a_text(llm: LLM, tokenizer: Tokenizer) -> None:
    rng = Random(3)
    for _ in range(10):
        (turn,) = tasks.recall(
            rng, num_tokens=400, num_facts=8, num_questions=1, held_out=True
        ).turns
        prompt = encode_prompt(tokenizer, [turn])
        (done,) = llm.generate([prompt], SamplingParams(max_tokens=8, temperature=0.0))
        assert done.text == turn.assistant


def test_the_exam_can_be_failed() -> None:
    assert matches("JSON", '{"a": 1,"b":2}', '{"b": 2, "a": 1}')
    assert not matches("JSON", '{"a": 1', '{"a": 1}')
    assert not matches("JSON", '{"a": 2}', '{"a": 1}')
    assert not matches("copy", "fox ,owl", "fox, owl")
    assert not Score(task="copy", prompts=20, right=18, target=0.95).reaches_target
    assert Score(task="copy", prompts=20, right=19, target=0.95).reaches_target
