"""The engine on a GPU against the one on the CPU: tokens, graphs, overlap, conservation."""

import pytest
import torch
from support.kernel_checks import needs_gpu

from baton.common.sampling import SamplingParams
from baton.engine.llm import LLM
from baton.models.random_model import write_random_model

pytestmark = [pytest.mark.gpu, needs_gpu]

GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
ARENA = {"block_size": 16, "num_blocks": 400, "max_num_batched_tokens": 256, "max_num_seqs": 12}
# The share of answers that must be equal where sums are rounded otherwise.
NEAR_TIES = 0.9
SHAPES = {
    "llama": {},
    "qwen2, head 64": {"family": "qwen2", "head_dim": 64},
    "qwen3, head 128": {"family": "qwen3", "head_dim": 128, "num_heads": 4, "num_kv_heads": 1},
    "head 80": {"head_dim": 80, "num_heads": 4, "num_kv_heads": 2},
    "head 96": {"head_dim": 96, "num_heads": 4, "num_kv_heads": 2},
    "head 256": {"head_dim": 256, "num_heads": 4, "num_kv_heads": 2},
}


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lens = torch.randint(1, 300, (count,), generator=generator).tolist()
    return [torch.randint(5, 300, (n,), generator=generator).tolist() for n in lens]


def outputs(folder, asked, sampling=GREEDY, **options) -> list[list[int]]:
    llm = LLM(folder, check_invariants=True, **{**ARENA, **options})
    answers = [done.token_ids for done in llm.generate(asked, sampling)]
    llm.engine.close()
    return answers


def share_equal(one: list[list[int]], other: list[list[int]]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


@pytest.fixture(params=SHAPES)
def folder(request, tmp_path):
    return write_random_model(tmp_path / "model", **SHAPES[request.param])


def test_tokens_equal_the_cpus(folder):
    """fp32; among 1,600 tokens a near tie may fall the other way, and an answer goes on from it."""
    asked = prompts(40)
    assert share_equal(outputs(folder, asked, device="cuda"), outputs(folder, asked)) >= NEAR_TIES


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_graphs_and_plain_launches_give_the_same_tokens(folder, dtype):
    asked = prompts(30)
    options = {"device": "cuda", "dtype": dtype}
    with_graphs = outputs(folder, asked, **options)
    assert outputs(folder, asked, cuda_graphs=False, **options) == with_graphs


def test_sampled_tokens_equal_the_cpus(tmp_path):
    """Every parameter, of which some wait for tokens and some do not."""
    folder = write_random_model(tmp_path / "model")
    asked = prompts(40)
    kinds = [
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.2, "top_k": 20},
        {"min_p": 0.1},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 0.0, "presence_penalty": 0.7, "frequency_penalty": 0.3},
        {"temperature": 0.0, "logit_bias": ((7, 5.0), (9, -3.0)), "min_tokens": 5},
    ]
    sampling = [
        SamplingParams(max_tokens=24, seed=number, **kinds[number % len(kinds)])
        for number in range(len(asked))
    ]
    on_gpu = outputs(folder, asked, sampling, device="cuda")
    assert share_equal(on_gpu, outputs(folder, asked, sampling)) >= NEAR_TIES


def test_a_cached_prefix_changes_no_token(folder):
    llm = LLM(folder, device="cuda", **ARENA)
    (prompt,) = [list(range(5, 205))]
    (first,) = llm.generate([prompt], GREEDY)
    (second,) = llm.generate([prompt], GREEDY)
    assert second.cached_tokens == 192
    assert second.token_ids == first.token_ids
    llm.engine.close()


def test_overlap_changes_no_token(tmp_path):
    folder = write_random_model(tmp_path / "model")
    asked, answers = prompts(30), []
    for max_in_flight in (1, 2):
        llm = LLM(folder, device="cuda", **ARENA)
        llm.engine.max_in_flight = max_in_flight
        answers.append([done.token_ids for done in llm.generate(asked, GREEDY)])
        llm.engine.close()
    # Prompts are cut otherwise, and products of other shapes round otherwise.
    assert share_equal(*answers) >= NEAR_TIES


def test_digests_hold_on_the_device(tmp_path):
    folder = write_random_model(tmp_path / "model")
    asked = prompts(20)
    assert outputs(folder, asked, device="cuda", kv_digest=True) == outputs(
        folder, asked, device="cuda"
    )
