"""The control stream between router and worker, to protobuf and back.

A malformed message raises InvalidRequest here, before any state machine sees it.
"""

from baton.common.block_hash import MAX_KEY_BYTES
from baton.common.codec import (
    error_from_pb,
    error_to_pb,
    finish_from_pb,
    finish_to_pb,
    identity_from_pb,
    identity_to_pb,
    key_from_pb,
    key_to_pb,
    role_from_pb,
    role_to_pb,
    sampling_from_pb,
    sampling_to_pb,
)
from baton.common.errors import InvalidRequest
from baton.common.ids import RouterId
from baton.common.messages import (
    Cancel,
    DecodeJob,
    HandoverReport,
    LeaseRow,
    LiveRequest,
    LoadReport,
    ModelInfo,
    Move,
    OutputRecord,
    PrefillJob,
    PrefillReport,
    Reap,
    RouterHello,
    RouterMessage,
    SetDraining,
    Stay,
    Submit,
    WorkerHello,
)
from baton.v1 import worker_pb2 as pb

MAX_GRANT_KEY_BYTES = 64


def submit_to_pb(submit: Submit) -> pb.Submit:
    wire = pb.Submit(
        key=key_to_pb(submit.key),
        prompt_token_ids=submit.prompt_tokens,
        output_token_ids=submit.output_tokens,
        sampling=sampling_to_pb(submit.sampling),
        tenant_key=submit.tenant_key,
        age_s=submit.age_s,
        time_left_s=submit.time_left_s,
        request_id=submit.request_id,
    )
    if isinstance(submit.job, PrefillJob):
        wire.prefill.grant_key = submit.job.grant_key
        wire.prefill.SetInParent()
        if submit.job.reader is not None:
            wire.prefill.reader.CopyFrom(identity_to_pb(submit.job.reader))
    else:
        wire.decode.grant_key = submit.job.grant_key
        wire.decode.owner_link_address = submit.job.owner_link_address
        wire.decode.SetInParent()
        if submit.job.owner is not None:
            wire.decode.owner.CopyFrom(identity_to_pb(submit.job.owner))
    return wire


def submit_from_pb(wire: pb.Submit) -> Submit:
    job = _job_from_pb(wire)
    if len(wire.tenant_key) > MAX_KEY_BYTES:
        raise InvalidRequest(
            f"a tenant key has at most {MAX_KEY_BYTES} bytes, this one has {len(wire.tenant_key)}",
            field="tenant_key",
        )
    return Submit(
        key=key_from_pb(wire.key),
        prompt_tokens=list(wire.prompt_token_ids),
        output_tokens=list(wire.output_token_ids),
        sampling=sampling_from_pb(wire.sampling),
        tenant_key=wire.tenant_key,
        age_s=wire.age_s,
        time_left_s=wire.time_left_s,
        job=job,
        request_id=wire.request_id,
    )


def _job_from_pb(wire: pb.Submit) -> PrefillJob | DecodeJob:
    if wire.HasField("prefill"):
        reader = identity_from_pb(wire.prefill.reader) if wire.prefill.HasField("reader") else None
        return PrefillJob(reader, _grant_key(wire.prefill.grant_key))
    if wire.HasField("decode"):
        owner = identity_from_pb(wire.decode.owner) if wire.decode.HasField("owner") else None
        return DecodeJob(owner, wire.decode.owner_link_address, _grant_key(wire.decode.grant_key))
    raise InvalidRequest("a submit names its job: prefill or decode", field="job")


def _grant_key(wire: bytes) -> bytes:
    if len(wire) > MAX_GRANT_KEY_BYTES:
        raise InvalidRequest(
            f"a grant key has at most {MAX_GRANT_KEY_BYTES} bytes, this one has {len(wire)}",
            field="grant_key",
        )
    return wire


def router_message_to_pb(message: RouterMessage) -> pb.AttachRequest:
    match message:
        case Submit():
            return pb.AttachRequest(submit=submit_to_pb(message))
        case Cancel(key):
            return pb.AttachRequest(cancel=pb.Cancel(key=key_to_pb(key)))
        case Move(key, to, reader, grant_key):
            return pb.AttachRequest(
                move=pb.Move(
                    key=key_to_pb(key),
                    to=key_to_pb(to),
                    reader=identity_to_pb(reader),
                    grant_key=grant_key,
                )
            )
        case Stay(key):
            return pb.AttachRequest(stay=pb.Stay(key=key_to_pb(key)))
        case SetDraining(draining):
            return pb.AttachRequest(set_draining=pb.SetDraining(draining=draining))
        case Reap(keys):
            return pb.AttachRequest(reap=pb.Reap(keys=[key_to_pb(key) for key in keys]))


def router_message_from_pb(wire: pb.AttachRequest) -> RouterMessage | None:
    """What a router asks for; None is a heartbeat. Submits in parts are put together before."""
    kind = wire.WhichOneof("message")
    match kind:
        case "submit":
            return submit_from_pb(wire.submit)
        case "cancel":
            return Cancel(key_from_pb(wire.cancel.key))
        case "move":
            move = wire.move
            return Move(
                key_from_pb(move.key),
                key_from_pb(move.to),
                identity_from_pb(move.reader),
                _grant_key(move.grant_key),
            )
        case "stay":
            return Stay(key_from_pb(wire.stay.key))
        case "set_draining":
            return SetDraining(wire.set_draining.draining)
        case "reap":
            return Reap(tuple(key_from_pb(key) for key in wire.reap.keys))
        case "heartbeat":
            return None
    raise InvalidRequest(f"a router does not send {kind} here", field="message")


def router_hello_to_pb(hello: RouterHello) -> pb.RouterHello:
    return pb.RouterHello(
        router_id=hello.router_id,
        router_epoch=hello.router_epoch,
        live=[
            pb.LiveRequest(key=key_to_pb(live.key), next_position=live.next_position)
            for live in hello.live
        ],
    )


def router_hello_from_pb(wire: pb.RouterHello) -> RouterHello:
    if not wire.router_id:
        raise InvalidRequest("an attach hello names its router", field="router_id")
    live = tuple(LiveRequest(key_from_pb(entry.key), entry.next_position) for entry in wire.live)
    return RouterHello(RouterId(wire.router_id), wire.router_epoch, live)


def model_to_pb(model: ModelInfo) -> pb.ModelInfo:
    return pb.ModelInfo(
        name=model.name,
        path=model.path,
        fingerprint=model.fingerprint,
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        block_size=model.block_size,
    )


def model_from_pb(wire: pb.ModelInfo) -> ModelInfo:
    return ModelInfo(
        name=wire.name,
        path=wire.path,
        fingerprint=wire.fingerprint,
        max_model_len=wire.max_model_len,
        vocab_size=wire.vocab_size,
        block_size=wire.block_size,
    )


def lease_row_to_pb(row: LeaseRow) -> pb.LeaseRow:
    return pb.LeaseRow(
        key=key_to_pb(row.key),
        owner=row.owner,
        reader=row.reader,
        blocks=row.blocks,
        bytes=row.num_bytes,
        age_s=row.age_s,
        expires_in_s=row.expires_in_s,
        state=row.state,
        request_id=row.request_id,
        why=row.why,
        router=row.router,
    )


def lease_row_from_pb(wire: pb.LeaseRow) -> LeaseRow:
    return LeaseRow(
        key=key_from_pb(wire.key),
        owner=wire.owner,
        reader=wire.reader,
        blocks=wire.blocks,
        num_bytes=wire.bytes,
        age_s=wire.age_s,
        expires_in_s=wire.expires_in_s,
        state=wire.state,
        request_id=wire.request_id,
        why=wire.why,
        router=wire.router,
    )


def load_to_pb(load: LoadReport) -> pb.LoadReport:
    return pb.LoadReport(
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
        steps=load.steps,
        stalled_s=load.stalled_s,
        pinned_unowned_bytes=load.pinned_unowned_bytes,
        counters=load.counters,
    )


def load_from_pb(wire: pb.LoadReport) -> LoadReport:
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
        steps=wire.steps,
        stalled_s=wire.stalled_s,
        pinned_unowned_bytes=wire.pinned_unowned_bytes,
        counters=dict(wire.counters),
    )


def worker_hello_to_pb(hello: WorkerHello) -> pb.WorkerHello:
    return pb.WorkerHello(
        identity=identity_to_pb(hello.identity),
        role=role_to_pb(hello.role),
        model=model_to_pb(hello.model),
        link_address=hello.link_address,
        pid=hello.pid,
        load=load_to_pb(hello.load),
    )


def worker_hello_from_pb(wire: pb.WorkerHello) -> WorkerHello:
    return WorkerHello(
        identity=identity_from_pb(wire.identity),
        role=role_from_pb(wire.role),
        model=model_from_pb(wire.model),
        link_address=wire.link_address,
        pid=wire.pid,
        load=load_from_pb(wire.load),
    )


def record_to_pb(record: OutputRecord) -> pb.OutputRecord:
    wire = pb.OutputRecord(
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


def record_from_pb(wire: pb.OutputRecord) -> OutputRecord:
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
        finish=finish_from_pb(wire.finish),
        prefill=prefill,
        handover=handover,
        error=error_from_pb(wire.error) if wire.HasField("error") else None,
        forwarded_tokens=wire.forwarded_tokens,
    )
