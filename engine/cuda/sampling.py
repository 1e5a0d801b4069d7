"""From logits to tokens on the device, with the steps of `baton.engine.sampler` in their order."""

from collections import Counter
from collections.abc import Collection
from collections.abc import Sequence as Ordered
from dataclasses import dataclass

import numpy as np
import torch

from baton.engine.cuda.inputs import Unpacked
from baton.engine.sampler import Draw
from baton.kernels.logit_edits import BANNED, SEEN, LogitEdits, edit_logits_triton
from baton.kernels.sampling import sample_triton

# Draws that are spread over the device: rows with top-p need a second one in ten times.
ROUNDS_WITH_TOP_P = 4


@dataclass(frozen=True, slots=True)
class CudaSampler:
    """Keeps no state."""

    eos_token_ids: Collection[int]
    device: torch.device

    def sample(
        self, logits: torch.Tensor, unpacked: Unpacked, draws: Ordered[Draw], out: torch.Tensor
    ) -> None:
        """Write the token of each draw into `out` int32 `[L]`, -1 where none is possible; `logits`
        `[L, vocab]` may be changed."""
        edits = self._edits(draws, logits.shape[1])
        if edits is not None:
            edit_logits_triton(logits, edits)
        has_top_p = any(draw.sampling.top_p < 1.0 for draw in draws)
        rounds = ROUNDS_WITH_TOP_P if has_top_p else 1
        sample_triton(logits, unpacked.sampling_rows(), rounds=rounds, out=out)

    def _edits(self, draws: Ordered[Draw], vocab_size: int) -> LogitEdits | None:
        """Those of the rows that ask for some."""
        rows: list[int] = []
        entries: list[list[tuple[int, float, int, int]]] = []
        for row, draw in enumerate(draws):
            of_row = self._entries(draw, vocab_size)
            if of_row:
                rows.append(row)
                entries.append(of_row)
        if not rows:
            return None
        params = [draws[row].sampling for row in rows]
        token, bias, count, flags = zip(*(entry for each in entries for entry in each), strict=True)
        return LogitEdits(
            row_offsets=self._ints([0, *np.cumsum([len(each) for each in entries])]),
            rows=self._ints(rows),
            repetition=self._floats([each.repetition_penalty for each in params]),
            presence=self._floats([each.presence_penalty for each in params]),
            frequency=self._floats([each.frequency_penalty for each in params]),
            token=self._ints(token),
            bias=self._floats(bias),
            output_count=self._ints(count),
            flags=self._ints(flags),
        )

    def _entries(self, draw: Draw, vocab_size: int) -> list[tuple[int, float, int, int]]:
        """Token, bias, occurrences in the output, flags; each token once."""
        sampling = draw.sampling
        bias: dict[int, float] = {}
        for token, value in sampling.logit_bias:
            bias[token] = bias.get(token, 0.0) + value
        seen: set[int] = set()
        counts: Counter[int] = Counter()
        if sampling.has_penalties:
            seen = set(draw.tokens)
            counts = Counter(draw.tokens[draw.prompt_len :])
        banned: set[int] = set()
        if draw.num_output < sampling.min_tokens:
            banned = {*self.eos_token_ids, *sampling.stop_token_ids}
        return [
            (
                token,
                bias.get(token, 0.0),
                counts[token],
                (SEEN if token in seen else 0) | (BANNED if token in banned else 0),
            )
            for token in sorted({*bias, *seen, *banned})
            if 0 <= token < vocab_size
        ]

    def _ints(self, values: Ordered[int]) -> torch.Tensor:
        return self._on_device(torch.tensor(values, dtype=torch.int32))

    def _floats(self, values: Ordered[float]) -> torch.Tensor:
        return self._on_device(torch.tensor(values, dtype=torch.float32))

    def _on_device(self, values: torch.Tensor) -> torch.Tensor:
        return values.pin_memory().to(self.device, non_blocking=True)
