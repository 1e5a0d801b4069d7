"""Whether what an owner says of a lease can be of the request at all.

An owner is a peer of the same release or another: what it says wrongly must cost one request, never
the engine.
"""

from baton.common.errors import BatonError, InternalError
from baton.common.messages import LeaseStatus
from baton.decode_worker.request import DecodeRequest
from baton.worker.admission import Limits


def misfit(request: DecodeRequest, status: LeaseStatus, limits: Limits) -> BatonError | None:
    """What in an OPEN status cannot be of the request, or None."""
    wrong = _wrong_extent(request, status, limits) or _wrong_output(request, status, limits)
    return None if wrong is None else InternalError(f"{request.owner} {wrong}")


def _wrong_extent(request: DecodeRequest, status: LeaseStatus, limits: Limits) -> str | None:
    sequence = request.sequence
    most = sequence.prompt_len + sequence.sampling.max_tokens - 1
    least = sequence.prompt_len + max(0, request.num_submitted - 1)
    if not least <= status.kv_tokens <= most:
        return f"leased the KV of {status.kv_tokens} tokens, not of {least} to {most}"
    expected = limits.num_blocks_for(status.kv_tokens)
    if status.slots and len(status.slots) != expected:
        return f"leased {len(status.slots)} blocks for KV of {expected}"
    if status.readable_tokens > status.kv_tokens:
        return f"announced {status.readable_tokens} tokens of {status.kv_tokens}"
    if request.status is not None and request.status.kv_tokens != status.kv_tokens:
        return f"leased {request.status.kv_tokens} tokens before and {status.kv_tokens} now"
    return None


def _wrong_output(request: DecodeRequest, status: LeaseStatus, limits: Limits) -> str | None:
    sequence, output = request.sequence, status.output_tokens
    if not output:
        return None
    if max(output) >= limits.vocab_size:
        return f"sampled token {max(output)}, the vocabulary has {limits.vocab_size}"
    end = status.output_position + len(output)
    if status.output_position > sequence.num_output or end < sequence.num_output:
        return f"sent output [{status.output_position}, {end}) after {sequence.num_output}"
    if not status.finished and sequence.prompt_len + end != status.kv_tokens + 1:
        return f"sent {end} output tokens with KV of {status.kv_tokens}"
    return None
