"""The forward of kernels against that of torch references: interpreted here, compiled on a GPU."""

from collections.abc import Sequence as Ordered
from dataclasses import replace

import pytest
import torch
from support.kernel_checks import DEVICE, HAS_GPU, needs_triton

from baton.common.ids import BlockHash, Slot
from baton.common.sampling import SamplingParams
from baton.engine.arena import Arena
from baton.engine.cuda.inputs import Planner, StepInputs, Unpacked, clear_tails, packed_lists
from baton.engine.cuda.layout import lay_out
from baton.engine.cuda.model import CudaModel
from baton.engine.model import Model
from baton.engine.model_config import ModelConfig, load_model_config
from baton.engine.runner import ModelRunner, arena_layout
from baton.engine.sampler import Draw
from baton.engine.sequence import Chunk, Sequence
from baton.engine.weights import load_weights
from baton.kernels.step_inputs import resolve_tokens_triton
from baton.models.random_model import write_random_model

BLOCK_SIZE = 8
NUM_SLOTS = 24
GREEDY = SamplingParams(max_tokens=100, temperature=0.0)
SHAPES = {
    "llama": {"family": "llama"},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3"},
    "odd head": {"family": "llama", "head_dim": 20, "num_kv_heads": 2, "num_heads": 2},
}
SMALL = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
REST = {"intermediate_size": 48, "vocab_size": 300, "max_model_len": 256}


class Pair:
    """Both models over arenas of their own, and the sequences that run through both."""

    def __init__(self, folder, config: ModelConfig) -> None:
        self.config = config
        layout = arena_layout(config, BLOCK_SIZE)
        self.arenas = [Arena(layout, NUM_SLOTS), Arena(layout, NUM_SLOTS, str(DEVICE))]
        for arena in self.arenas:
            # A slot's last owner may have left anything there.
            arena.tensor[:NUM_SLOTS].fill_(torch.nan)
        self.reference = ModelRunner(Model(config, load_weights(folder, config)), self.arenas[0])
        weights = load_weights(folder, config, device=DEVICE)
        if not HAS_GPU:
            # The layout of a GPU, which the loader gives to GPUs alone.
            layers = tuple(
                replace(
                    layer,
                    **{name: getattr(layer, name).T.contiguous() for name in MATRICES},
                )
                for layer in weights.layers
            )
            weights = replace(weights, layers=layers, lm_head=weights.lm_head.T.contiguous())
        self.model = CudaModel(config, weights, DEVICE)
        self.planner = Planner(config, DEVICE)

    def step(self, chunks: Ordered[Chunk], sampled: list[int], pad_to: int = 0):
        """Logits of both."""
        expected = self.reference.prepare(chunks)(sampled)
        draws = [Draw.of(chunk.sequence) for chunk in chunks if chunk.is_last]
        listed = self.planner.list_decode([c.end for c in chunks if c.num_tokens == 1])
        layout = lay_out(chunks, draws, BLOCK_SIZE, pad_to=pad_to, lists=packed_lists(listed))
        unpacked = Unpacked.of(layout, torch.from_numpy(layout.words).to(DEVICE))
        arena = self.arenas[1].tensor
        clear_tails(arena, layout)
        source, positions, slots, offsets = unpacked.per_token.unbind()
        before = torch.tensor(sampled, dtype=torch.int32, device=DEVICE)
        step = StepInputs(
            token_ids=resolve_tokens_triton(source, before),
            positions=positions,
            slots=slots,
            offsets=offsets,
            # Padding is rows of a graph, which no list of work names.
            num_decode=layout.num_decode + layout.num_rows - layout.num_tokens,
            decode_table=unpacked.decode_table,
            decode_works=self.planner.decode(listed, unpacked),
            prefill_table=unpacked.prefill_table,
            prefill_works=self.planner.prefill(layout.prefill_lens),
            last=None if layout.samples_all else unpacked.last,
        )
        with torch.inference_mode():
            logits = self.model.forward(step, arena)
        for chunk in chunks:
            chunk.sequence.launch(chunk.num_tokens, None)
            chunk.sequence.land(chunk.num_tokens, None)
        return expected, logits


MATRICES = ("qkv", "o", "gate_up", "down")


@pytest.fixture(params=[*SHAPES, "window"])
def pair(request, tmp_path) -> Pair:
    shape = {**SMALL, **SHAPES.get(request.param, {}), **REST}
    folder = write_random_model(tmp_path / "model", **shape)
    config = load_model_config(folder)
    if request.param == "window":
        config = replace(config, sliding_window=(None, 11))
    return Pair(folder, config)


def sequences(lens: list[int]) -> list[Sequence]:
    generator = torch.Generator().manual_seed(3)
    slots = iter(torch.randperm(NUM_SLOTS, generator=generator).tolist())
    made = []
    for length in lens:
        tokens = torch.randint(5, 290, (length,), generator=generator).tolist()
        made.append(
            Sequence(
                tokens=tokens,
                prompt_len=length,
                sampling=GREEDY,
                tenant_key=b"",
                root=BlockHash(b""),
                slots=[Slot(next(slots)) for _ in range(-(-(length + 13) // BLOCK_SIZE))],
            )
        )
    return made


def error_of(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.float().cpu() - expected).norm() / expected.norm())


@needs_triton
def test_logits_equal_the_references(pair: Pair) -> None:
    """Chunks, whole prompts, mixed steps and decode, over slots full of NaN."""
    first, second, third = sequences([29, 3, 17])
    steps = [
        [Chunk(first, 13), Chunk(second, 3)],
        [Chunk(first, 9)],
        [Chunk(third, 17), Chunk(first, 7)],
    ]
    for chunks in steps:
        expected, logits = pair.step(chunks, [])
        assert (logits is None) == (len(expected) == 0)
        if logits is not None:
            assert error_of(logits, expected) < 2e-5
    for number in range(12):
        for sequence in (first, second, third):
            sequence.tokens.append(20 + number)
        order = [first, second, third] if number % 2 else [third, first, second]
        expected, logits = pair.step([Chunk(each, 1) for each in order], [])
        assert error_of(logits, expected) < 2e-5


@needs_triton
def test_decodes_beside_a_prompt_come_back_in_the_order_of_the_chunks(pair: Pair) -> None:
    first, second, third = sequences([9, 20, 12])
    pair.step([Chunk(first, 9), Chunk(third, 12)], [])
    first.tokens.append(40)
    third.tokens.append(41)
    expected, logits = pair.step([Chunk(first, 1), Chunk(second, 20), Chunk(third, 1)], [])
    assert error_of(logits, expected) < 2e-5


@needs_triton
def test_promised_tokens_come_from_the_step_before(pair: Pair) -> None:
    first, second = sequences([9, 12])
    pair.step([Chunk(first, 9), Chunk(second, 12)], [])
    for place, sequence in enumerate((second, first)):
        sequence.num_promised, sequence.promised_at = 1, place
    chunks = [Chunk(first, 1), Chunk(second, 1)]
    expected, logits = pair.step(chunks, [50, 51])
    assert error_of(logits, expected) < 2e-5
    # As if the tokens had been known: 51 for the first sequence, 50 for the second.
    assert pair.reference.tokens_forwarded == 23


@needs_triton
# Padding computes with whatever memory held.
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_padding_changes_no_logits_and_writes_nothing(pair: Pair) -> None:
    first, second = sequences([9, 12])
    pair.step([Chunk(first, 9), Chunk(second, 12)], [])
    first.tokens.append(40)
    second.tokens.append(41)
    used = {*first.slots, *second.slots}
    expected, logits = pair.step([Chunk(first, 1), Chunk(second, 1)], [], pad_to=8)
    assert logits.shape[0] == 8
    assert error_of(logits[:2], expected) < 2e-5
    untouched = [slot for slot in range(NUM_SLOTS) if slot not in used]
    assert pair.arenas[1].tensor[untouched].isnan().all()
