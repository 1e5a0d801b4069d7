"""Runs steps on a GPU: each is queued on one stream, and the host waits for nothing.

    host     lay out n+1 | queue n+1 | ............ tokens of n | lay out n+2 | ...
    stream   ... step n ................. | step n+1 ................. | ...

What a step needs crosses in one copy, and its tokens come back in one. Steps of one token per row
replay a graph; those with prompts run kernel by kernel.
"""

import threading
from collections.abc import Sequence as Ordered
from typing import Final

import torch

from baton.common.errors import InternalError
from baton.engine.arena import Arena
from baton.engine.cuda.graphs import DecodeGraphs, GraphSize
from baton.engine.cuda.inputs import (
    ListedWorks,
    Planner,
    StepInputs,
    Unpacked,
    check_arena,
    clear_tails,
    packed_lists,
)
from baton.engine.cuda.layout import Layout, lay_out
from baton.engine.cuda.model import CudaModel
from baton.engine.cuda.sampling import CudaSampler
from baton.engine.cuda.staging import Staging
from baton.engine.device import Ticket
from baton.engine.sampler import Draw
from baton.engine.sequence import Chunk
from baton.kernels.step_inputs import resolve_tokens_triton

POLL_S: Final = 1e-4
NO_TOKEN: Final = -1


class CudaRunner:
    """Implements `Stepper`, and counts its work as a `Runner` does. Engine thread only."""

    def __init__(
        self,
        model: CudaModel,
        arena: Arena,
        planner: Planner,
        *,
        max_rows: int,
        stream: torch.cuda.Stream,
        graphs: DecodeGraphs | None,
    ) -> None:
        check_arena(arena.layout, model.config)
        self._model = model
        self._arena = arena.tensor
        self._block_size = arena.layout.block_size
        self._planner = planner
        self._graphs = graphs
        self._sampler = CudaSampler(model.config.eos_token_ids, model.device)
        self.stream = stream
        self._staging = Staging(model.device, stream, max_rows)
        self._max_rows = max_rows
        self.tokens_forwarded = 0
        self.steps = 0
        self.replayed: bool | None = None

    def launch(self, chunks: Ordered[Chunk]) -> Ticket[list[int]]:
        with torch.cuda.stream(self.stream), torch.inference_mode():
            return self._launch(chunks)

    def close(self) -> None:
        self.stream.synchronize()

    def _launch(self, chunks: Ordered[Chunk]) -> "CudaTicket":
        draws = [Draw.of(chunk.sequence) for chunk in chunks if chunk.is_last]
        assert len(draws) <= self._max_rows, "more rows than the engine was built for"
        listed = self._planner.list_decode([c.end for c in chunks if c.num_tokens == 1])
        graph = self._graph_for(chunks, listed)
        self.replayed = graph is not None
        logits: torch.Tensor | None
        if self._graphs is not None and graph is not None:
            lists = self._graphs.lists(graph, listed)
            layout = lay_out(chunks, draws, self._block_size, pad_to=graph.num_rows, lists=lists)
            unpacked = Unpacked.of(layout, self._staging.upload(layout.words))
            logits = self._graphs.replay(graph, unpacked, self._staging.sampled_before)
        else:
            layout = lay_out(chunks, draws, self._block_size, lists=packed_lists(listed))
            unpacked = Unpacked.of(layout, self._staging.upload(layout.words))
            logits = self._forward(layout, unpacked, listed)
        if draws:
            assert logits is not None, "what is sampled has logits"
            sampled = self._staging.sampled[: len(draws)]
            self._sampler.sample(logits[: len(draws)], unpacked, draws, sampled)
        tokens, ended = self._staging.download(len(draws))
        return CudaTicket(self, ended, tokens, layout.num_tokens)

    def _graph_for(self, chunks: Ordered[Chunk], listed: ListedWorks) -> GraphSize | None:
        """None where the step runs kernel by kernel."""
        is_decode = all(chunk.num_tokens == 1 and chunk.is_last for chunk in chunks)
        if self._graphs is None or not is_decode:
            return None
        return self._graphs.fit(len(chunks), listed)

    def _forward(
        self, layout: Layout, unpacked: Unpacked, listed: ListedWorks
    ) -> torch.Tensor | None:
        clear_tails(self._arena, layout)
        source, positions, slots, offsets = unpacked.per_token.unbind()
        step = StepInputs(
            token_ids=resolve_tokens_triton(source, self._staging.sampled_before),
            positions=positions,
            slots=slots,
            offsets=offsets,
            num_decode=layout.num_decode,
            decode_table=unpacked.decode_table,
            decode_works=self._planner.decode(listed, unpacked),
            prefill_table=unpacked.prefill_table,
            prefill_works=self._planner.prefill(layout.prefill_lens),
            last=None if layout.samples_all else unpacked.last,
        )
        return self._model.forward(step, self._arena)

    def count(self, num_tokens: int) -> None:
        """A step of so many tokens has ended."""
        self.tokens_forwarded += num_tokens
        self.steps += 1


class CudaTicket:
    """Implements `Ticket`: the event behind the last write of a step, and its tokens."""

    def __init__(
        self,
        runner: CudaRunner,
        ended: torch.cuda.Event,
        tokens: torch.Tensor,
        num_tokens: int,
    ) -> None:
        self._runner = runner
        self._ended = ended
        self._tokens = tokens
        self._num_tokens = num_tokens

    def poll(self) -> bool:
        return bool(self._ended.query())

    def result(self) -> list[int]:
        assert self.poll(), "the step has not ended"
        self._runner.count(self._num_tokens)
        tokens: list[int] = self._tokens.tolist()
        if NO_TOKEN in tokens:
            raise InternalError("no token is possible: the model's logits are not numbers")
        return tokens

    def wait(self, timeout_s: float) -> None:
        never = threading.Event()
        for _ in range(int(timeout_s / POLL_S)):
            if self._ended.query():
                return
            never.wait(POLL_S)
        raise InternalError(f"the GPU has not ended a step within {timeout_s:g} s")
