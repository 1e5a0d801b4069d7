"""Three processes, real NIXL: the answers are those of transformers, for each model family."""

import asyncio
import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.devices import MODEL_DEVICES
from support.hf_models import FAMILIES, VOCAB, greedy, write_family
from tokenizers import Tokenizer
from transformers import PretrainedConfig

from baton.cli.cluster import Cluster, Plan
from baton.client.admin import AdminClient
from baton.client.client import BatonClient
from baton.client.replies import Finish

OUTPUT = 64
MULTI_BYTE = "Übermut 東京タワー 🌶️🌶️ ภาษาไทย — naïve café " * 4


@dataclass(frozen=True)
class Case:
    prompt: str | list[int]
    tokens: list[int]


def cases(tokenizer: Tokenizer) -> list[Case]:
    """16 prompts: of one token, around a block, of several chunks, of multi-byte text."""
    source = random.Random(1)
    lengths = [1, 2, 31, 32, 33, 63, 64, 65, 100, 150, 200, 257, 300, 301]
    ids = [[source.randrange(5, VOCAB) for _ in range(length)] for length in lengths]
    texts = [MULTI_BYTE, "The prefill worker hands the baton to the decode worker."]
    return [
        *(Case(tokens, tokens) for tokens in ids),
        *(Case(text, tokenizer.encode(text).ids) for text in texts),
    ]


async def ask(client: BatonClient, case: Case) -> tuple[list[int], Finish]:
    """All output tokens and the finish of one greedy request."""
    tokens: list[int] = []
    finish = None
    async for chunk in client.generate(
        case.prompt, max_tokens=OUTPUT, temperature=0.0, ignore_eos=True
    ):
        tokens.extend(chunk.token_ids)
        finish = chunk.finish or finish
    assert finish is not None
    return tokens, finish


@pytest.mark.parametrize("device", MODEL_DEVICES)
@pytest.mark.parametrize("family", sorted(FAMILIES))
async def test_tokens_equal_transformers(family: str, device: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder, model = write_family(family, tmp_path)
    asked = cases(Tokenizer.from_file(str(folder / "tokenizer.json")))
    expected = [greedy(model, case.tokens, OUTPUT) for case in asked]
    assert len({tuple(tokens) for tokens in expected}) == len(expected), "answers must differ"
    plan = Plan(
        model=str(folder),
        router_flags={"http_port": 0, "grpc_port": 0, "admin_port": 0},
        worker_flags={
            "max_num_batched_tokens": 128,
            "num_threads": 1,
            "num_blocks": 400,
            "check_invariants": True,
            # On a GPU both workers share it.
            "device": device,
            "max_num_seqs": 16,
        },
    )
    cluster = Cluster(plan)
    try:
        await cluster.start()
        async with BatonClient(cluster.endpoints.grpc) as client:
            first = await asyncio.gather(*(ask(client, case) for case in asked))
            second = await asyncio.gather(*(ask(client, case) for case in asked))
    finally:
        await cluster.stop()
    for case, want, (tokens, finish), (again, finish_again) in zip(
        asked, expected, first, second, strict=True
    ):
        assert tokens == want, f"{family}: a prompt of {len(case.tokens)} tokens"
        assert again == want, f"{family}: from the cache, a prompt of {len(case.tokens)} tokens"
        cached = (len(case.tokens) - 1) // 32 * 32
        assert finish.prompt_tokens == len(case.tokens)
        assert finish_again.cached_tokens >= cached
        assert finish_again.prefill_computed_tokens <= len(case.tokens) - cached
        for done in (finish, finish_again):
            assert (done.mode.value, done.transport) == ("disagg", "nixl")
            assert done.decode_forwarded_tokens == OUTPUT - 1
            blocks = -(-len(case.tokens) // 32) - done.decode_cached_tokens // 32
            assert done.kv_bytes == blocks * _block_bytes(model.config)


async def test_a_decode_worker_that_stands_still_for_less_than_six_seconds_keeps_its_requests(
    tiny_llama: Path,
) -> None:
    """Tokens are in flight when it freezes, so that gRPC pings it at once."""
    plan = Plan(
        model=str(tiny_llama),
        router_flags={"http_port": 0, "grpc_port": 0, "admin_port": 0},
        worker_flags={"num_threads": 1, "num_blocks": 400},
    )
    cluster = Cluster(plan)
    try:
        await cluster.start()
        async with (
            BatonClient(cluster.endpoints.grpc) as client,
            AdminClient(cluster.endpoints.admin) as admin,
        ):
            (pid,) = [worker.pid for worker in await admin.workers() if worker.role == "decode"]
            tokens: list[int] = []
            async for chunk in client.generate(
                [7, 8, 9], max_tokens=1000, temperature=0.0, ignore_eos=True
            ):
                if len(tokens) < 10 <= len(tokens) + len(chunk.token_ids):
                    os.kill(pid, signal.SIGSTOP)
                    loop = asyncio.get_running_loop()
                    loop.call_later(4.5, os.kill, pid, signal.SIGCONT)
                tokens.extend(chunk.token_ids)
    finally:
        await cluster.stop()
    assert len(tokens) == 1000


def _block_bytes(config: PretrainedConfig) -> int:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 32 * config.num_key_value_heads * config.num_hidden_layers * 2 * head_dim * 4
