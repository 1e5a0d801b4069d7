"""From logits to tokens.

A row passes these steps in this order; each is skipped when its parameter switches it off:

    1. logit bias           added
    2. repetition penalty   tokens of prompt and output: positive logits divided, others multiplied
                            (CTRL, Keskar et al. 2019; as Hugging Face does)
    3. presence, frequency  subtracted once, and per occurrence, for output tokens (as OpenAI does)
    4. min_tokens           while fewer were sampled, EOS and stop token ids are impossible
    5. temperature          0 takes the best now, lowest id first among equals
    6. top-k                logits below the k-th are out; equals of the k-th stay
    7. top-p                over what is left, the smallest set of likeliest tokens reaching p
    8. min-p                over what is left, tokens at least min_p times as likely as the best
    9. Gumbel-max           with the noise of (seed, choice 0, position), see `philox`

The position is the number of output tokens so far, so a retried request draws the same numbers.
"""

from collections import Counter
from collections.abc import Collection
from collections.abc import Sequence as Ordered
from dataclasses import dataclass

import numpy as np
import torch

from baton.common.sampling import SamplingParams
from baton.engine.philox import gumbel_at
from baton.engine.sequence import Sequence

NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class Draw:
    """What decides the next token of a sequence beside its logits, as of the launch of its step."""

    sampling: SamplingParams
    num_output: int
    # Prompt and output, for what depends on them: empty where tokens were promised and unknown.
    tokens: Ordered[int]
    prompt_len: int

    @classmethod
    def of(cls, sequence: Sequence) -> "Draw":
        """The draw after the newest token, known or promised."""
        is_known = sequence.num_promised == 0
        assert is_known or not sequence.sampling.has_penalties, "penalties wait for tokens"
        return cls(
            sequence.sampling,
            sequence.num_output + sequence.num_promised,
            sequence.tokens if is_known else (),
            sequence.prompt_len,
        )


class Sampler:
    """Chooses the next token of each row. Keeps no state: all that decides is in the arguments."""

    def __init__(self, eos_token_ids: Collection[int]) -> None:
        self._eos_token_ids = tuple(eos_token_ids)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, draws: Ordered[Draw]) -> list[int]:
        """One token per draw from fp32 logits `[n, vocab]`, which are left as they are."""
        assert logits.shape[0] == len(draws), "one row of logits per draw"
        if not draws:
            return []
        plain = [self._is_plain_greedy(draw) for draw in draws]
        tokens: list[int] = logits.argmax(dim=-1).tolist() if any(plain) else [0] * len(draws)
        filtered: dict[int, torch.Tensor] = {}
        for row, draw in enumerate(draws):
            if plain[row]:
                continue
            scores = self._adjusted(logits[row], draw)
            if draw.sampling.is_greedy:
                tokens[row] = int(scores.argmax())
            else:
                filtered[row] = _filtered(scores, draw.sampling)
        if filtered:
            found = _draw(list(filtered.values()), [draws[row] for row in filtered])
            for row, token in zip(filtered, found, strict=True):
                tokens[row] = token
        return tokens

    def _is_plain_greedy(self, draw: Draw) -> bool:
        sampling = draw.sampling
        return (
            sampling.is_greedy
            and not sampling.has_penalties
            and not sampling.logit_bias
            and draw.num_output >= sampling.min_tokens
        )

    def _adjusted(self, row: torch.Tensor, draw: Draw) -> torch.Tensor:
        """A copy of the row after bias, penalties and min_tokens."""
        sampling = draw.sampling
        scores = row.clone()
        for token, bias in sampling.logit_bias:
            scores[token] += bias
        if sampling.repetition_penalty != 1.0:
            _penalize_repetition(scores, draw.tokens, sampling.repetition_penalty)
        if sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0:
            output = draw.tokens[draw.prompt_len :]
            _penalize_output(scores, output, sampling.presence_penalty, sampling.frequency_penalty)
        if draw.num_output < sampling.min_tokens:
            stops = {*self._eos_token_ids, *sampling.stop_token_ids}
            scores[[token for token in stops if 0 <= token < scores.shape[0]]] = NEVER
        return scores


def _filtered(scores: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """`scores` [vocab] after temperature and filters; what was filtered out is impossible."""
    # Relative to the best, so that a tiny temperature cannot overflow.
    scores = (scores - scores.max()) / sampling.temperature
    if sampling.top_k > 0:
        scores = keep_top_k(scores, sampling.top_k)
    if sampling.top_p < 1.0:
        scores = keep_top_p(scores, sampling.top_p)
    if sampling.min_p > 0.0:
        scores = keep_min_p(scores, sampling.min_p)
    return scores


def keep_top_k(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """`scores` [vocab] with everything below the k-th best impossible."""
    kth = torch.topk(scores, min(top_k, scores.shape[0])).values[-1]
    return scores.masked_fill(scores < kth, NEVER)


def keep_top_p(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """`scores` [vocab] with everything outside the nucleus impossible; the best always stays.

    Nucleus sampling: Holtzman et al., "The curious case of neural text degeneration", 2020.
    """
    ordered, order = torch.sort(scores, descending=True, stable=True)
    probabilities = torch.softmax(ordered, dim=-1)
    before = torch.cumsum(probabilities, dim=-1) - probabilities
    out = before >= top_p
    out[0] = False
    return scores.masked_fill(torch.empty_like(out).scatter_(0, order, out), NEVER)


def keep_min_p(scores: torch.Tensor, min_p: float) -> torch.Tensor:
    """`scores` [vocab] with everything less than `min_p` times as likely as the best impossible."""
    probabilities = torch.softmax(scores, dim=-1)
    return scores.masked_fill(probabilities < min_p * probabilities.max(), NEVER)


def _penalize_repetition(scores: torch.Tensor, tokens: Ordered[int], penalty: float) -> None:
    seen = torch.tensor(sorted(set(tokens)), dtype=torch.int64, device=scores.device)
    values = scores[seen]
    scores[seen] = torch.where(values > 0, values / penalty, values * penalty)


def _penalize_output(
    scores: torch.Tensor, output: Ordered[int], presence: float, frequency: float
) -> None:
    counts = Counter(output)
    seen = torch.tensor(list(counts), dtype=torch.int64, device=scores.device)
    times = torch.tensor(list(counts.values()), dtype=scores.dtype, device=scores.device)
    scores[seen] -= presence + frequency * times


def _draw(scores: list[torch.Tensor], draws: list[Draw]) -> list[int]:
    """Gumbel-max of each row; noise is computed for tokens that are still possible alone."""
    values = torch.stack(scores).cpu().numpy()
    rows, token_ids = np.nonzero(values > NEVER)
    assert np.unique(rows).size == len(draws), "no token is possible: logits are not numbers"
    seeds = np.array([draw.sampling.seed for draw in draws], dtype=np.uint64)
    positions = np.array([draw.num_output for draw in draws], dtype=np.uint32)
    values[rows, token_ids] += gumbel_at(seeds[rows], positions[rows], token_ids.astype(np.uint32))
    found: list[int] = values.argmax(axis=-1).tolist()
    return found
