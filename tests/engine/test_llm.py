"""The whole engine in one process: tokens equal those of Hugging Face, and work is counted."""

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from baton.common.errors import (
    ConfigError,
    ContextLengthExceeded,
    ExceedsKvCapacity,
    InvalidRequest,
    ModelError,
)
from baton.common.sampling import FinishReason, SamplingParams
from baton.engine.llm import LLM
from baton.models.random_model import write_random_model

BLOCK = 8
MAX_LEN = 128
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def folder(request, tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "m", family=request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "m")


def tiny_model(folder: Path, **options) -> Path:
    return write_random_model(
        folder,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=96,
        vocab_size=300,
        max_model_len=MAX_LEN,
        **options,
    )


def make_llm(folder: Path, **options) -> LLM:
    return LLM(
        folder, **{"block_size": BLOCK, "num_blocks": 64, "check_invariants": True, **options}
    )


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 300, (n,), generator=generator).tolist() for n in lengths]


@cache
def oracle_model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def oracle(folder: Path, prompt: list[int], max_new: int) -> list[int]:
    """Greedy tokens of Hugging Face; the margins must be wide enough to compare."""
    model = oracle_model(folder)
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=max_new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    for scores in out.scores:
        best, second = scores[0].topk(2).values.tolist()
        assert best - second > 1e-3, "the oracle's choice is a near tie; take another seed"
    return out.sequences[0, len(prompt) :].tolist()


@pytest.mark.parametrize("budget", [2048, 16])
def test_tokens_equal_hugging_face(folder, budget):
    asked = prompts(1, 7, 8, 9, 40)
    llm = make_llm(folder, max_num_batched_tokens=budget, max_num_seqs=4)
    for prompt, done in zip(asked, llm.generate(asked, GREEDY), strict=True):
        assert done.token_ids == oracle(folder, prompt, 20)
        assert done.finish_reason is FinishReason.LENGTH
        assert done.prompt_tokens == len(prompt)


def test_reused_prefix_gives_equal_tokens_and_less_work(llama):
    llm = make_llm(llama)
    (shared,) = prompts(30)
    first, second = [*shared, 5, 6, 7], [*shared, 9, 9, 9, 9]
    (before,) = llm.generate([first], GREEDY)
    assert before.cached_tokens == 0
    forwarded = llm.engine.runner.tokens_forwarded
    assert forwarded == len(first) + 19

    (after,) = llm.generate([second], GREEDY)
    assert after.cached_tokens == 24, "three full blocks of the shared 30 tokens"
    assert llm.engine.runner.tokens_forwarded - forwarded == len(second) - 24 + 19
    assert after.token_ids == make_llm(llama).generate([second], GREEDY)[0].token_ids


def test_whole_prompt_in_cache_still_forwards_its_last_token(llama):
    llm = make_llm(llama)
    (prompt,) = prompts(4 * BLOCK)
    first = llm.generate([prompt], GREEDY)[0]
    again = llm.generate([prompt], GREEDY)[0]
    assert again.cached_tokens == 3 * BLOCK
    assert again.token_ids == first.token_ids


def test_next_turn_finds_the_generated_tokens(llama):
    llm = make_llm(llama)
    (prompt,) = prompts(13)
    done = llm.generate([prompt], GREEDY)[0]
    turn = [*prompt, *done.token_ids, 7, 8]
    # 13 + 19 tokens were fed: the last sampled one was not, so four blocks and no more.
    assert llm.generate([turn], GREEDY)[0].cached_tokens == 32


def test_tenants_share_nothing(llama):
    llm = make_llm(llama)
    (prompt,) = prompts(33)
    red = llm.generate([prompt], GREEDY, tenant_key=b"red")[0]
    blue = llm.generate([prompt], GREEDY, tenant_key=b"blue")[0]
    again = llm.generate([prompt], GREEDY, tenant_key=b"red")[0]
    assert (red.cached_tokens, blue.cached_tokens, again.cached_tokens) == (0, 0, 32)
    assert red.token_ids == blue.token_ids == again.token_ids


def test_scarce_blocks_change_nothing_but_the_order(llama):
    asked = prompts(20, 33, 9, 28, 17, 40, seed=1)
    plenty = make_llm(llama).generate(asked, GREEDY)
    scarce = make_llm(llama, num_blocks=8)
    found = scarce.generate(asked, GREEDY)
    assert [done.token_ids for done in found] == [done.token_ids for done in plenty]
    assert scarce.engine.kv.available == 8


def test_equal_seeds_repeat_and_batches_do_not_matter(llama):
    asked = prompts(10, 10, 10)
    params = [SamplingParams(max_tokens=12, temperature=1.0, seed=seed) for seed in (1, 2, 1)]
    together = make_llm(llama).generate(asked, params)
    alone = [make_llm(llama).generate([p], s)[0] for p, s in zip(asked, params, strict=True)]
    assert [done.token_ids for done in together] == [done.token_ids for done in alone]


def test_tokens_are_told_as_they_come(llama):
    heard = {0: [], 1: []}
    done = make_llm(llama).generate(
        prompts(5, 20), GREEDY, on_token=lambda index, token: heard[index].append(token)
    )
    assert [each.token_ids for each in done] == [heard[0], heard[1]]


def test_listener_that_raises_leaves_no_blocks_reserved(llama):
    llm = make_llm(llama)

    def fail(index, token):
        raise KeyError(token)

    with pytest.raises(KeyError):
        llm.generate(prompts(20, 30), GREEDY, on_token=fail)
    assert llm.engine.kv.available == 64
    llm.engine.check(sequences=[])


def test_eos_and_stop_tokens_end_a_sequence(llama):
    llm = make_llm(llama)
    (prompt,) = prompts(12)
    free = llm.generate([prompt], GREEDY)[0].token_ids
    stop = free[5]
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,))
    done = llm.generate([prompt], params)[0]
    assert done.token_ids == free[: free.index(stop) + 1]
    assert done.finish_reason is FinishReason.STOP


def test_output_ends_at_the_model_length(llama):
    (prompt,) = prompts(MAX_LEN - 3)
    params = SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True)
    done = make_llm(llama).generate([prompt], params)[0]
    assert len(done.token_ids) == 3
    assert done.finish_reason is FinishReason.LENGTH


def test_text_in_and_out(llama):
    llm = make_llm(llama)
    done = llm.generate(["The runner 🙂", "今日"], SamplingParams(max_tokens=8, seed=3))
    assert all(isinstance(each.text, str) for each in done)
    assert any(each.text for each in done)
    assert done[0].prompt_tokens > 1


def test_dummy_weights_need_only_a_config(llama, tmp_path):
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    llm = make_llm(tmp_path, load_format="dummy")
    done = llm.generate(prompts(5), SamplingParams(max_tokens=3, temperature=0.0))[0]
    assert done.text == ""
    assert done.token_ids
    with pytest.raises(ModelError, match="tokenizer"):
        llm.generate(["text"], GREEDY)


@pytest.mark.parametrize(
    ("prompt", "params", "error", "field"),
    [
        ([], GREEDY, InvalidRequest, "prompt"),
        ([300], GREEDY, InvalidRequest, "prompt"),
        ([-1], GREEDY, InvalidRequest, "prompt"),
        ([1] * MAX_LEN, GREEDY, ContextLengthExceeded, "prompt"),
        ([1] * 100, SamplingParams(max_tokens=28), ExceedsKvCapacity, "max_tokens"),
        ([1], SamplingParams(max_tokens=0), InvalidRequest, "max_tokens"),
        ([1], SamplingParams(max_tokens=1, min_tokens=2), InvalidRequest, "min_tokens"),
        (
            [1],
            SamplingParams(max_tokens=1, temperature=float("nan")),
            InvalidRequest,
            "temperature",
        ),
        ([1], SamplingParams(max_tokens=1, top_p=0.0), InvalidRequest, "top_p"),
        ([1], SamplingParams(max_tokens=1, seed=-1), InvalidRequest, "seed"),
        ([1], SamplingParams(max_tokens=1, logit_bias=((300, 1.0),)), InvalidRequest, "logit_bias"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(llama, prompt, params, error, field):
    llm = make_llm(llama, num_blocks=15)
    with pytest.raises(error) as caught:
        llm.generate([[1, 2], prompt], [GREEDY, params])
    assert caught.value.field == field
    assert llm.engine.runner.steps == 0


def test_sampling_per_prompt_must_match_in_number(llama):
    with pytest.raises(InvalidRequest, match="2 sampling parameters for 1 prompts"):
        make_llm(llama).generate([[1]], [GREEDY, GREEDY])


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 0},
        {"num_blocks": 4, "kv_memory_bytes": 1 << 20},
        {"num_blocks": None, "kv_memory_bytes": 10},
        {"max_num_seqs": 9, "max_num_batched_tokens": 8},
    ],
)
def test_impossible_configurations_are_refused(llama, options):
    with pytest.raises(ConfigError):
        make_llm(llama, **options)


def test_a_model_that_runs_on_the_cpu_has_its_arena_there(llama):
    with pytest.raises(ConfigError) as caught:
        make_llm(llama, device="cuda:0")
    assert caught.value.field == "device"


def test_default_arena_is_256_mebibytes(llama):
    engine = make_llm(llama, num_blocks=None).engine
    assert engine.num_blocks == 256 * 2**20 // engine.arena.block_bytes
