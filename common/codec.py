"""Messages to protobuf and back: the control stream between router and worker.

A malformed message raises InvalidRequest here, before any state machine sees it.
"""

from baton.common.block_hash import MAX_KEY_BYTES
from baton.common.errors import BatonError, InvalidRequest, from_reason
from baton.common.ids import (
    TRANSFER_ID_BYTES,
    Epoch,
    RequestKey,
    RouterId,
    TransferId,
    WorkerId,
    WorkerIdentity,
)
from baton.common.messages import (
    Cancel,
    DecodeJob,
    HandoverReport,
    LeaseRow,
    LoadReport,
    ModelInfo,
    OutputRecord,
    PrefillJob,
    PrefillReport,
    RouterHello,
    Submit,
    WorkerHello,
)
from baton.common.sampling import FinishReason, Role, SamplingParams
from baton.v1 import common_pb2 as pb
from baton.v1 import worker_pb2 as worker_pb

_FINISH_TO_PB = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
_FINISH_FROM_PB = {wire: reason for reason, wire in _FINISH_TO_PB.items()}
_ROLE_TO_PB = {Role.PREFILL: pb.ROLE_PREFILL, Role.DECODE: pb.ROLE_DECODE}
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


def _finish_from_pb(wire: pb.FinishReason) -> FinishReason | None:
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


def submit_to_pb(submit: Submit) -> worker_pb.Submit:
    wire = worker_pb.Submit(
        key=key_to_pb(submit.key),
        prompt_token_ids=submit.prompt_tokens,
        sampling=sampling_to_pb(submit.sampling),
        tenant_key=submit.tenant_key,
        age_s=submit.age_s,
        time_left_s=submit.time_left_s,
    )
    if isinstance(submit.job, PrefillJob):
        wire.prefill.SetInParent()
        if submit.job.reader is not None:
            wire.prefill.reader.CopyFrom(identity_to_pb(submit.job.reader))
    else:
        wire.decode.owner.CopyFrom(identity_to_pb(submit.job.owner))
        wire.decode.owner_link_address = submit.job.owner_link_address
    return wire


def submit_from_pb(wire: worker_pb.Submit) -> Submit:
    job: PrefillJob | DecodeJob
    if wire.HasField("prefill"):
        reader = identity_from_pb(wire.prefill.reader) if wire.prefill.HasField("reader") else None
        job = PrefillJob(reader)
    elif wire.HasField("decode"):
        job = DecodeJob(identity_from_pb(wire.decode.owner), wire.decode.owner_link_address)
    else:
        raise InvalidRequest("a submit names its job: prefill or decode", field="job")
    if len(wire.tenant_key) > MAX_KEY_BYTES:
        raise InvalidRequest(
            f"a tenant key has at most {MAX_KEY_BYTES} bytes, this one has {len(wire.tenant_key)}",
            field="tenant_key",
        )
    return Submit(
        key=key_from_pb(wire.key),
        prompt_tokens=list(wire.prompt_token_ids),
        sampling=sampling_from_pb(wire.sampling),
        tenant_key=wire.tenant_key,
        age_s=wire.age_s,
        time_left_s=wire.time_left_s,
        job=job,
    )


def cancel_to_pb(cancel: Cancel) -> worker_pb.Cancel:
    return worker_pb.Cancel(key=key_to_pb(cancel.key))


def router_hello_to_pb(hello: RouterHello) -> worker_pb.RouterHello:
    return worker_pb.RouterHello(
        router_id=hello.router_id,
        router_epoch=hello.router_epoch,
        live=[worker_pb.LiveRequest(key=key_to_pb(key)) for key in hello.live],
    )


def router_hello_from_pb(wire: worker_pb.RouterHello) -> RouterHello:
    if not wire.router_id:
        raise InvalidRequest("an attach hello names its router", field="router_id")
    live = tuple(key_from_pb(entry.key) for entry in wire.live)
    return RouterHello(RouterId(wire.router_id), wire.router_epoch, live)


def model_to_pb(model: ModelInfo) -> worker_pb.ModelInfo:
    return worker_pb.ModelInfo(
        name=model.name,
        path=model.path,
        fingerprint=model.fingerprint,
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        block_size=model.block_size,
    )


def model_from_pb(wire: worker_pb.ModelInfo) -> ModelInfo:
    return ModelInfo(
        name=wire.name,
        path=wire.path,
        fingerprint=wire.fingerprint,
        max_model_len=wire.max_model_len,
        vocab_size=wire.vocab_size,
        block_size=wire.block_size,
    )


def lease_row_to_pb(row: LeaseRow) -> worker_pb.LeaseRow:
    return worker_pb.LeaseRow(
        key=key_to_pb(row.key),
        owner=row.owner,
        reader=row.reader,
        blocks=row.blocks,
        bytes=row.num_bytes,
        age_s=row.age_s,
        expires_in_s=row.expires_in_s,
        state=row.state,
    )


def lease_row_from_pb(wire: worker_pb.LeaseRow) -> LeaseRow:
    return LeaseRow(
        key=key_from_pb(wire.key),
        owner=wire.owner,
        reader=wire.reader,
        blocks=wire.blocks,
        num_bytes=wire.bytes,
        age_s=wire.age_s,
        expires_in_s=wire.expires_in_s,
        state=wire.state,
    )


def load_to_pb(load: LoadReport) -> worker_pb.LoadReport:
    return worker_pb.LoadReport(
        blocks_total=load.blocks_total,
        blocks_free=load.blocks_free,
        blocks_cached=load.blocks_cached,
        blocks_leased=load.blocks_leased,
        blocks_quarantined=load.blocks_quarantined,
        requests_running=load.requests_running,
        requests_waiting=load.requests_waiting,
        tokens_pending=load.tokens_pending,
        preemptions=load.preemptions,
        draining=load.draining,
        leases=[lease_row_to_pb(row) for row in load.leases],
    )


def load_from_pb(wire: worker_pb.LoadReport) -> LoadReport:
    return LoadReport(
        blocks_total=wire.blocks_total,
        blocks_free=wire.blocks_free,
        blocks_cached=wire.blocks_cached,
        blocks_leased=wire.blocks_leased,
        blocks_quarantined=wire.blocks_quarantined,
        requests_running=wire.requests_running,
        requests_waiting=wire.requests_waiting,
        tokens_pending=wire.tokens_pending,
        preemptions=wire.preemptions,
        draining=wire.draining,
        leases=tuple(lease_row_from_pb(row) for row in wire.leases),
    )


def worker_hello_to_pb(hello: WorkerHello) -> worker_pb.WorkerHello:
    return worker_pb.WorkerHello(
        identity=identity_to_pb(hello.identity),
        role=role_to_pb(hello.role),
        model=model_to_pb(hello.model),
        link_address=hello.link_address,
        pid=hello.pid,
        load=load_to_pb(hello.load),
    )


def worker_hello_from_pb(wire: worker_pb.WorkerHello) -> WorkerHello:
    return WorkerHello(
        identity=identity_from_pb(wire.identity),
        role=role_from_pb(wire.role),
        model=model_from_pb(wire.model),
        link_address=wire.link_address,
        pid=wire.pid,
        load=load_from_pb(wire.load),
    )


def record_to_pb(record: OutputRecord) -> worker_pb.OutputRecord:
    wire = worker_pb.OutputRecord(
        key=key_to_pb(record.key),
        position=record.position,
        token_ids=record.tokens,
        finish=finish_to_pb(record.finish),
        forwarded_tokens=record.forwarded_tokens,
    )
    if record.prefill is not None:
        wire.prefill.cached_tokens = record.prefill.cached_tokens
        wire.prefill.computed_tokens = record.prefill.computed_tokens
        wire.prefill.queue_s = record.prefill.queue_s
        wire.prefill.compute_s = record.prefill.compute_s
    if record.handover is not None:
        wire.handover.pulled_blocks = record.handover.pulled_blocks
        wire.handover.pulled_bytes = record.handover.pulled_bytes
        wire.handover.transport = record.handover.transport
        wire.handover.cached_tokens = record.handover.cached_tokens
        wire.handover.owner_cached_tokens = record.handover.owner_cached_tokens
        wire.handover.pull_s = record.handover.pull_s
        wire.handover.SetInParent()
    if record.error is not None:
        wire.error.CopyFrom(error_to_pb(record.error))
    return wire


def record_from_pb(wire: worker_pb.OutputRecord) -> OutputRecord:
    prefill = handover = None
    if wire.HasField("prefill"):
        prefill = PrefillReport(
            cached_tokens=wire.prefill.cached_tokens,
            computed_tokens=wire.prefill.computed_tokens,
            queue_s=wire.prefill.queue_s,
            compute_s=wire.prefill.compute_s,
        )
    if wire.HasField("handover"):
        handover = HandoverReport(
            pulled_blocks=wire.handover.pulled_blocks,
            pulled_bytes=wire.handover.pulled_bytes,
            transport=wire.handover.transport,
            cached_tokens=wire.handover.cached_tokens,
            owner_cached_tokens=wire.handover.owner_cached_tokens,
            pull_s=wire.handover.pull_s,
        )
    return OutputRecord(
        key=key_from_pb(wire.key),
        position=wire.position,
        tokens=tuple(wire.token_ids),
        finish=_finish_from_pb(wire.finish),
        prefill=prefill,
        handover=handover,
        error=error_from_pb(wire.error) if wire.HasField("error") else None,
        forwarded_tokens=wire.forwarded_tokens,
    )
