"""When a sequence ends, seen from its tokens. Stop strings are the router's business."""

from collections.abc import Collection

from baton.common.sampling import FinishReason
from baton.engine.sequence import Sequence


def finish_reason(
    sequence: Sequence, eos_token_ids: Collection[int], max_model_len: int
) -> FinishReason | None:
    """Why the sequence ends with its newest output token, or None if it goes on.

    The first `min_tokens` output tokens never stop it; the sampler masks what would.
    """
    assert sequence.num_output > 0, "only an output token can end a sequence"
    sampling = sequence.sampling
    token = sequence.tokens[-1]
    if sequence.num_output > sampling.min_tokens:
        is_eos = token in eos_token_ids and not sampling.ignore_eos
        if is_eos or token in sampling.stop_token_ids:
            return FinishReason.STOP
    if sequence.num_output >= sampling.max_tokens or len(sequence.tokens) >= max_model_len:
        return FinishReason.LENGTH
    return None


def will_end(sequence: Sequence, max_model_len: int) -> bool:
    """Whether the tokens that are promised end the sequence, whatever they turn out to be."""
    return (
        sequence.num_output + sequence.num_promised >= sequence.sampling.max_tokens
        or len(sequence.tokens) + sequence.num_promised >= max_model_len
    )
