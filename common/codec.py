"""What all protocols share, to protobuf and back: keys, identities, errors, roles, sampling.

A malformed message raises InvalidRequest here, before any state machine sees it.
"""

from baton.common.errors import BatonError, InvalidRequest, from_reason
from baton.common.ids import (
    TRANSFER_ID_BYTES,
    Epoch,
    RequestKey,
    TransferId,
    WorkerId,
    WorkerIdentity,
)
from baton.common.sampling import FinishReason, Role, SamplingParams
from baton.v1 import common_pb2 as pb

_FINISH_TO_PB = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
_FINISH_FROM_PB = {wire: reason for reason, wire in _FINISH_TO_PB.items()}
_ROLE_TO_PB = {
    Role.PREFILL: pb.ROLE_PREFILL,
    Role.DECODE: pb.ROLE_DECODE,
    Role.UNIFIED: pb.ROLE_UNIFIED,
}
_ROLE_FROM_PB = {wire: role for role, wire in _ROLE_TO_PB.items()}


def key_to_pb(key: RequestKey) -> pb.RequestKey:
    return pb.RequestKey(transfer_id=key.transfer_id, attempt=key.attempt)


def key_from_pb(wire: pb.RequestKey) -> RequestKey:
    if len(wire.transfer_id) != TRANSFER_ID_BYTES:
        raise InvalidRequest(
            f"a transfer id has {TRANSFER_ID_BYTES} bytes, this one has {len(wire.transfer_id)}",
            field="transfer_id",
        )
    return RequestKey(TransferId(wire.transfer_id), wire.attempt)


def identity_to_pb(identity: WorkerIdentity) -> pb.WorkerIdentity:
    return pb.WorkerIdentity(
        worker_id=identity.worker_id, epoch=identity.epoch, incarnation=identity.incarnation
    )


def identity_from_pb(wire: pb.WorkerIdentity) -> WorkerIdentity:
    if not wire.worker_id or not wire.epoch:
        raise InvalidRequest("a worker identity needs an id and an epoch", field="identity")
    return WorkerIdentity(WorkerId(wire.worker_id), Epoch(wire.epoch), wire.incarnation)


def error_to_pb(error: BatonError) -> pb.ErrorDetail:
    return pb.ErrorDetail(reason=error.reason, message=error.message)


def error_from_pb(wire: pb.ErrorDetail) -> BatonError:
    return from_reason(wire.reason, wire.message)


def role_to_pb(role: Role) -> pb.Role:
    return _ROLE_TO_PB[role]


def role_from_pb(wire: pb.Role) -> Role:
    if wire not in _ROLE_FROM_PB:
        raise InvalidRequest(f"unknown worker role {wire}", field="role")
    return _ROLE_FROM_PB[wire]


def finish_to_pb(finish: FinishReason | None) -> pb.FinishReason:
    return _FINISH_TO_PB[finish]


def finish_from_pb(wire: pb.FinishReason) -> FinishReason | None:
    if wire not in _FINISH_FROM_PB:
        raise InvalidRequest(f"unknown finish reason {wire}", field="finish")
    return _FINISH_FROM_PB[wire]


def sampling_to_pb(params: SamplingParams) -> pb.SamplingParams:
    return pb.SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=params.seed,
        min_tokens=params.min_tokens,
        ignore_eos=params.ignore_eos,
        logit_bias=[pb.LogitBias(token_id=token, bias=bias) for token, bias in params.logit_bias],
        stop_token_ids=params.stop_token_ids,
    )


def sampling_from_pb(wire: pb.SamplingParams) -> SamplingParams:
    """Parameters that a router already validated: all scalar fields are present."""
    return SamplingParams(
        max_tokens=wire.max_tokens,
        temperature=wire.temperature,
        top_p=wire.top_p,
        top_k=wire.top_k,
        min_p=wire.min_p,
        repetition_penalty=wire.repetition_penalty,
        presence_penalty=wire.presence_penalty,
        frequency_penalty=wire.frequency_penalty,
        seed=wire.seed,
        min_tokens=wire.min_tokens,
        ignore_eos=wire.ignore_eos,
        logit_bias=tuple((entry.token_id, entry.bias) for entry in wire.logit_bias),
        stop_token_ids=tuple(wire.stop_token_ids),
    )
