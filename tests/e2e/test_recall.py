"""Answers that are facts about their own prompt: right through a cluster, wrong when KV is.

All names and codes are ones that the model never saw in training.
"""

import asyncio
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from random import Random

import pytest
import torch
from support.cluster import Cluster as ClusterInOneProcess
from support.cluster import run_cluster
from support.devices import MODEL_DEVICES
from support.tampering import Aim, FlippingReader, tampering
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from baton.cli.cluster import Cluster, Plan
from baton.cli.model_folder import shipped_model
from baton.client.client import BatonClient
from baton.client.replies import Completion, Message
from baton.models.conversations import tasks
from baton.models.conversations.tasks import Turn

ANSWER_TOKENS = 64
BLOCK = 32
NUM_ASKED = 8


@dataclass
class Reference:
    """The model in transformers, in float32."""

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel

    def tokens(self, messages: list[Message]) -> list[int]:
        """The prompt of the last message's answer."""
        plain = [{"role": each.role, "content": each.content} for each in messages]
        text = self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def answer(self, messages: list[Message]) -> str:
        prompt = self.tokens(messages)
        output = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=1,
        )
        return str(self.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))


@pytest.fixture(scope="module")
def reference() -> Reference:
    torch.set_num_threads(1)
    folder = shipped_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Reference(AutoTokenizer.from_pretrained(folder), model)


def recall(rng: Random, num_tokens: int, num_facts: int, num_questions: int) -> list[Turn]:
    return tasks.recall(
        rng,
        num_tokens=num_tokens,
        num_facts=num_facts,
        num_questions=num_questions,
        held_out=True,
    ).turns


def conversations() -> list[list[Turn]]:
    rng = Random(31)
    return [
        *(recall(rng, 600, 8, 2) for _ in range(3)),
        recall(rng, 3000, 24, 2),
        *(tasks.multi_turn(rng, held_out=True) for _ in range(3)),
        tasks.sort(rng),
        tasks.add(rng, digits=3),
        [*tasks.small_talk(rng), *recall(rng, 300, 8, 1), *tasks.add(rng, digits=3)],
    ]


def asked_in(turns: list[Turn]) -> list[list[Message]]:
    """The messages up to each question; earlier answers are the right ones."""
    said: list[Message] = []
    asked = []
    for turn in turns:
        said.append(Message("user", turn.user))
        asked.append(list(said))
        said.append(Message("assistant", turn.assistant))
    return asked


async def converse(client: BatonClient, turns: list[Turn]) -> list[Completion]:
    """One turn after the other, so that each finds the KV of those before."""
    return [
        await client.complete(messages, max_tokens=ANSWER_TOKENS, temperature=0.0)
        for messages in asked_in(turns)
    ]


@pytest.mark.parametrize("device", MODEL_DEVICES)
async def test_three_processes_answer_as_transformers_does(
    device: str, reference: Reference
) -> None:
    talks = conversations()
    plan = Plan(
        model=str(shipped_model()),
        router_flags={"http_port": 0, "grpc_port": 0, "admin_port": 0},
        worker_flags={
            "dtype": "float32",
            "num_threads": 1,
            "check_invariants": True,
            "device": device,
            "kv_memory": "256MiB",
        },
    )
    cluster = Cluster(plan)
    try:
        await cluster.start()
        async with BatonClient(cluster.endpoints.grpc) as client:
            answers = await asyncio.gather(*(converse(client, turns) for turns in talks))
    finally:
        await cluster.stop()
    for turns, completions in zip(talks, answers, strict=True):
        asked = asked_in(turns)
        got = [completion.text for completion in completions]
        assert got == [reference.answer(messages) for messages in asked]
        # Right besides, with the same accuracy on every device.
        assert got == [turn.assistant for turn in turns]
        for before, after in pairwise(completions):
            # All full blocks of the turn before, but for the token that it answered from.
            known = (before.finish.prompt_tokens - 1) // BLOCK * BLOCK
            assert after.finish.cached_tokens >= known
            computed = after.finish.prompt_tokens - after.finish.cached_tokens
            assert after.finish.prefill_computed_tokens == computed
        for messages, completion in zip(asked, completions, strict=True):
            assert completion.finish.prompt_tokens == len(reference.tokens(messages))
            assert (completion.finish.mode.value, completion.finish.transport) == ("disagg", "nixl")


@dataclass
class Question:
    prompt: list[int]
    answer: str
    # The block of the prompt that holds the last digit of the asked code.
    fact_block: int


def questions(reference: Reference) -> list[Question]:
    rng = Random(17)
    asked = []
    for _ in range(NUM_ASKED):
        turn = recall(rng, 400, 8, 1)[0]
        prompt = reference.tokens([Message("user", turn.user)])
        digits = [reference.tokenizer.convert_tokens_to_ids(digit) for digit in turn.assistant]
        ends = [
            end
            for end in range(len(digits), len(prompt))
            if prompt[end - len(digits) : end] == digits
        ]
        assert len(ends) == 1, "the code stands once in the text, a token per digit"
        asked.append(Question(prompt, turn.assistant, (ends[0] - 1) // BLOCK))
    return asked


async def accuracy(
    cluster: ClusterInOneProcess, reference: Reference, asked: list[Question], aim: Aim | None
) -> float:
    """Which part is answered right; `aim` is taken at the fact of each prompt."""
    num_right = 0
    for question in asked:
        if aim is not None:
            aim.at(question.fact_block)
        done = await cluster.generate(question.prompt, max_tokens=8, ignore_eos=False)
        assert done.report.mode.value == "disagg"
        said = reference.tokenizer.decode(done.tokens, skip_special_tokens=True)
        # The prefill worker reads its own KV, which is right.
        assert said[0] == question.answer[0]
        num_right += said == question.answer
    return num_right / len(asked)


@pytest.mark.parametrize(("flips", "low", "high"), [(False, 1.0, 1.0), (True, 0.0, 0.25)])
async def test_recall_fails_when_one_block_crossed_wrong(
    flips: bool, low: float, high: float, reference: Reference, redis_url: str
) -> None:
    """One of about 13 blocks, the one that holds the fact; its fence finds nothing to object to."""
    aim = Aim()
    factory = tampering(partial(FlippingReader, aim=aim))
    flags = {"dtype": "float32", "factory": factory}
    async with run_cluster(shipped_model(), redis_url, **flags) as cluster:
        asked = questions(reference)
        reached = await accuracy(cluster, reference, asked, aim if flips else None)
        await cluster.expect_rest()
    assert aim.num_hits == (NUM_ASKED if flips else 0)
    assert low <= reached <= high
