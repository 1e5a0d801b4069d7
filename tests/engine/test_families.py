"""Logits of each family against Hugging Face's: chunked prefill, decode, mixed steps, any slots."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from baton.common.ids import BlockHash, Slot
from baton.common.sampling import SamplingParams
from baton.engine.arena import Arena
from baton.engine.batch import build_batch
from baton.engine.model import Model
from baton.engine.model_config import load_model_config
from baton.engine.runner import ModelRunner, arena_layout
from baton.engine.sequence import Chunk, Sequence
from baton.engine.weights import load_weights

BLOCK_SIZE = 8
NUM_SLOTS = 40
TOLERANCE = 1e-4
SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Larger than usual, so that a random model's attention is far from uniform.
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}
THETA = {"rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 2.0}


def llama(**changes: object) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))


def mistral(**changes: object) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**{**SIZES, **changes}))


def qwen2(**changes: object) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**{**SIZES, **changes}))


def qwen3(**changes: object) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "head_dim": 16, **changes}))


WINDOWED = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: llama(),
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama-wide-heads": lambda: llama(head_dim=20, num_key_value_heads=6),
    "llama-llama3": lambda: llama(rope_parameters={**THETA, **LLAMA3}),
    "llama-linear": lambda: llama(rope_parameters={**THETA, **LINEAR}),
    "llama-yarn": lambda: llama(rope_parameters={**THETA, **YARN}),
    "mistral-window": lambda: mistral(sliding_window=11),
    "mistral": lambda: mistral(sliding_window=None),
    "qwen2": lambda: qwen2(),
    "qwen2-window": lambda: qwen2(**WINDOWED),
    "qwen3": lambda: qwen3(),
    "qwen3-tied-window": lambda: qwen3(tie_word_embeddings=True, **WINDOWED),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def make_model(name: str) -> PreTrainedModel:
    """Random weights everywhere: fresh norms are all one and biases all zero."""
    torch.manual_seed(7)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model


def make_runner(folder: Path) -> ModelRunner:
    config = load_model_config(folder)
    assert config.dtype == "float32"
    arena = Arena(arena_layout(config, BLOCK_SIZE), NUM_SLOTS)
    # A slot's last owner may have left anything there.
    arena.tensor[:NUM_SLOTS].fill_(torch.nan)
    return ModelRunner(Model(config, load_weights(folder, config)), arena)


def make_sequences(lens: list[int], vocab_size: int) -> list[Sequence]:
    """Random tokens; slots are dealt out shuffled."""
    generator = torch.Generator().manual_seed(3)
    slots = [Slot(slot) for slot in torch.randperm(NUM_SLOTS, generator=generator).tolist()]
    sequences = []
    for length in lens:
        num_blocks = -(-length // BLOCK_SIZE)
        tokens = torch.randint(vocab_size, (length,), generator=generator).tolist()
        sequences.append(
            Sequence(
                tokens=tokens,
                prompt_len=length,
                sampling=SamplingParams(max_tokens=8),
                tenant_key=b"tenant",
                root=BlockHash(bytes(16)),
                slots=[slots.pop() for _ in range(num_blocks)],
            )
        )
    return sequences


def reveal(sequence: Sequence, num_tokens: int) -> Sequence:
    """The same sequence when only its first tokens were known."""
    return Sequence(
        tokens=sequence.tokens[:num_tokens],
        prompt_len=sequence.prompt_len,
        sampling=sequence.sampling,
        tenant_key=sequence.tenant_key,
        root=sequence.root,
        slots=sequence.slots,
        num_computed=sequence.num_computed,
    )


def forward(runner: ModelRunner, chunks: list[Chunk]) -> torch.Tensor:
    """One step, and the progress that an engine would note."""
    logits = runner.prepare(chunks)()
    for chunk in chunks:
        chunk.sequence.launch(chunk.num_tokens, None)
        chunk.sequence.land(chunk.num_tokens, None)
    return logits


def run_in_steps(runner: ModelRunner, sequence: Sequence, sizes: list[int]) -> torch.Tensor:
    """Forward `sizes` tokens after each other: the logits after each of those steps."""
    logits = []
    for size in sizes:
        view = reveal(sequence, sequence.num_computed + size)
        logits.append(forward(runner, [Chunk(view, size)]))
        sequence.num_computed = view.num_computed
    return torch.cat(logits)


@pytest.mark.parametrize("name", MODELS)
def test_chunked_prefill_and_decode_equal_hugging_face(name: str, tmp_path: Path) -> None:
    reference = make_model(name)
    reference.save_pretrained(tmp_path)
    runner = make_runner(tmp_path)
    [sequence] = make_sequences([61], SIZES["vocab_size"])
    sizes = [5, 8, 1, 19, 16, 7, 1, 1, 1, 1, 1]
    logits = run_in_steps(runner, sequence, sizes)
    with torch.no_grad():
        expected = reference(torch.tensor([sequence.tokens])).logits[0]
    ends = torch.tensor(sizes).cumsum(0) - 1
    assert logits.dtype == torch.float32
    assert (logits - expected[ends]).abs().max() < TOLERANCE
    assert expected.std() > 0.1, "a flat model would agree with anything"
    assert (runner.tokens_forwarded, runner.steps) == (61, len(sizes))


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3-tied-window"])
def test_a_mixed_step_equals_each_row_alone(name: str, tmp_path: Path) -> None:
    reference = make_model(name)
    reference.save_pretrained(tmp_path)
    runner = make_runner(tmp_path)
    first, second, third, fourth = make_sequences([40, 13, 29, 50], SIZES["vocab_size"])
    forward(runner, [Chunk(first, 39), Chunk(third, 10), Chunk(second, 12)])
    # Decode, a chunk that is not last, decode, a whole prompt.
    logits = forward(
        runner, [Chunk(first, 1), Chunk(third, 18), Chunk(second, 1), Chunk(fourth, 50)]
    )
    assert third.num_pending == 1
    last = forward(runner, [Chunk(third, 1)])
    with torch.no_grad():
        expected = [
            reference(torch.tensor([sequence.tokens])).logits[0, -1]
            for sequence in (first, second, fourth, third)
        ]
    assert (torch.cat((logits, last)) - torch.stack(expected)).abs().max() < TOLERANCE


def test_short_and_long_rows_decode_in_one_step(tmp_path: Path) -> None:
    reference = make_model("mistral-window")
    reference.save_pretrained(tmp_path)
    runner = make_runner(tmp_path)
    sequences = make_sequences([9, 120, 41, 2, 70], SIZES["vocab_size"])
    forward(runner, [Chunk(sequence, len(sequence.tokens) - 1) for sequence in sequences])
    chunks = [Chunk(sequence, 1) for sequence in sequences]
    groups = build_batch(chunks, BLOCK_SIZE, Slot(NUM_SLOTS)).decode
    # 15, 9, 6, 2 and 1 blocks: each group's shortest is at least half its longest.
    assert [group.block_table.shape for group in groups] == [(2, 15), (1, 6), (2, 2)]
    logits = forward(runner, chunks)
    with torch.no_grad():
        expected = [reference(torch.tensor([s.tokens])).logits[0, -1] for s in sequences]
    assert (logits - torch.stack(expected)).abs().max() < TOLERANCE


def test_a_chunk_that_is_not_last_gives_no_logits(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    runner = make_runner(tmp_path)
    [sequence] = make_sequences([20], SIZES["vocab_size"])
    assert forward(runner, [Chunk(sequence, 9)]).shape == (0, SIZES["vocab_size"])
    assert (sequence.num_computed, sequence.num_forwarded) == (9, 9)
    assert forward(runner, [Chunk(sequence, 11)]).shape == (1, SIZES["vocab_size"])


def test_sharded_checkpoint_gives_the_same_weights(tmp_path: Path) -> None:
    reference = make_model("qwen2")
    reference.save_pretrained(tmp_path / "single")
    reference.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    runs = []
    for folder in ("single", "shards"):
        [sequence] = make_sequences([30], SIZES["vocab_size"])
        runs.append(run_in_steps(make_runner(tmp_path / folder), sequence, [17, 13]))
    assert torch.equal(runs[0], runs[1])


def test_dummy_weights_are_seeded_and_finite(tmp_path: Path) -> None:
    make_model("qwen3").config.save_pretrained(tmp_path)
    config_path = tmp_path / "config.json"
    config_path.write_text(
        config_path.read_text().replace("{", '{"architectures": ["Qwen3ForCausalLM"],', 1)
    )
    config = load_model_config(tmp_path)
    runs = []
    for _ in range(2):
        weights = load_weights(tmp_path, config, "dummy")
        runner = ModelRunner(
            Model(config, weights), Arena(arena_layout(config, BLOCK_SIZE), NUM_SLOTS)
        )
        [sequence] = make_sequences([12], SIZES["vocab_size"])
        runs.append(forward(runner, [Chunk(sequence, 12)]))
    assert torch.equal(runs[0], runs[1])
    assert runs[0].isfinite().all()


def test_bfloat16_follows_hugging_face(tmp_path: Path) -> None:
    reference = make_model("qwen3").to(torch.bfloat16)
    reference.save_pretrained(tmp_path)
    config = load_model_config(tmp_path)
    assert config.dtype == "bfloat16"
    runner = ModelRunner(
        Model(config, load_weights(tmp_path, config)),
        Arena(arena_layout(config, BLOCK_SIZE), NUM_SLOTS),
    )
    [sequence] = make_sequences([34], SIZES["vocab_size"])
    logits = run_in_steps(runner, sequence, [30, 1, 3])
    with torch.no_grad():
        expected = reference(torch.tensor([sequence.tokens])).logits[0, [29, 30, 33]].float()
    cosine = torch.nn.functional.cosine_similarity(logits, expected, dim=-1)
    assert cosine.min() > 0.999
