"""Hypothesis strategies for what crosses between parts."""

from hypothesis import strategies as st

from baton.common.errors import all_errors, from_reason
from baton.common.ids import (
    Epoch,
    Generation,
    RequestKey,
    RouterId,
    Slot,
    TransferId,
    WorkerId,
    WorkerIdentity,
)
from baton.common.messages import (
    Cancel,
    DecodeJob,
    HandoverReport,
    LeaseClaim,
    LeaseRelease,
    LeaseRenew,
    LeaseRow,
    LeaseState,
    LeaseStatus,
    LiveRequest,
    LoadReport,
    ModelInfo,
    Move,
    OutputRecord,
    PrefillJob,
    PrefillReport,
    Reap,
    RouterHello,
    SetDraining,
    Stay,
    Submit,
    WorkerHello,
)
from baton.common.sampling import FinishReason, Role, SamplingParams
from baton.kvtransfer.transport.base import ArenaDescriptor

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
doubles = st.floats(allow_nan=False)
# Sampling travels as 32-bit floats, so only those come back equal.
singles = st.floats(allow_nan=False, width=32)
texts = st.text(max_size=20)
names = st.text(min_size=1, max_size=20)
few = {"max_size": 5}

keys = st.builds(RequestKey, st.binary(min_size=16, max_size=16).map(TransferId), attempt=u32)
identities = st.builds(
    WorkerIdentity, names.map(WorkerId), st.integers(1, 2**64 - 1).map(Epoch), texts
)
errors = st.builds(from_reason, st.sampled_from([cls.reason for cls in all_errors()]), texts)
samplings = st.builds(
    SamplingParams,
    max_tokens=u32,
    temperature=singles,
    top_p=singles,
    top_k=u32,
    min_p=singles,
    repetition_penalty=singles,
    presence_penalty=singles,
    frequency_penalty=singles,
    seed=u64,
    min_tokens=u32,
    ignore_eos=st.booleans(),
    logit_bias=st.lists(st.tuples(u32, singles), **few).map(tuple),
    stop_token_ids=st.lists(u32, **few).map(tuple),
)
jobs = st.one_of(
    st.builds(PrefillJob, st.none() | identities, st.binary(max_size=64)),
    st.builds(DecodeJob, st.none() | identities, texts, st.binary(max_size=64)),
)
submits = st.builds(
    Submit,
    key=keys,
    prompt_tokens=st.lists(u32, max_size=20),
    output_tokens=st.lists(u32, max_size=20),
    sampling=samplings,
    tenant_key=st.binary(max_size=64),
    age_s=doubles,
    time_left_s=doubles,
    job=jobs,
    request_id=texts,
)
lives = st.builds(LiveRequest, keys, u32)
router_hellos = st.builds(RouterHello, names.map(RouterId), u64, st.lists(lives, **few).map(tuple))
router_messages = st.one_of(
    submits,
    st.builds(Cancel, keys),
    st.builds(Move, keys, keys, identities, st.binary(max_size=64)),
    st.builds(Stay, keys),
    st.builds(SetDraining, st.booleans()),
    st.builds(Reap, st.lists(keys, **few).map(tuple)),
)
models = st.builds(
    ModelInfo,
    name=texts,
    path=texts,
    fingerprint=texts,
    max_model_len=u32,
    vocab_size=u32,
    block_size=u32,
)
lease_rows = st.builds(
    LeaseRow,
    key=keys,
    owner=texts,
    reader=texts,
    blocks=u32,
    num_bytes=u64,
    age_s=doubles,
    expires_in_s=doubles,
    state=texts,
    request_id=texts,
    why=texts,
    router=texts,
)
loads = st.builds(
    LoadReport,
    blocks_total=u32,
    blocks_free=u32,
    blocks_cached=u32,
    blocks_leased=u32,
    blocks_quarantined=u32,
    requests_running=u32,
    requests_waiting=u32,
    tokens_pending=u64,
    draining=st.booleans(),
    leases=st.lists(lease_rows, max_size=3).map(tuple),
    steps=u64,
    stalled_s=doubles,
    pinned_unowned_bytes=u64,
    counters=st.dictionaries(names, u64, max_size=3),
)
worker_hellos = st.builds(
    WorkerHello,
    identity=identities,
    role=st.sampled_from(Role),
    model=models,
    link_address=texts,
    pid=u32,
    load=loads,
)
prefill_reports = st.builds(
    PrefillReport, cached_tokens=u32, computed_tokens=u32, queue_s=doubles, compute_s=doubles
)
handover_reports = st.builds(
    HandoverReport,
    pulled_blocks=u32,
    pulled_bytes=u64,
    transport=texts,
    cached_tokens=u32,
    owner_cached_tokens=u32,
    pull_s=doubles,
)
records = st.builds(
    OutputRecord,
    key=keys,
    position=u32,
    tokens=st.lists(u32, **few).map(tuple),
    finish=st.none() | st.sampled_from(FinishReason),
    prefill=st.none() | prefill_reports,
    handover=st.none() | handover_reports,
    error=st.none() | errors,
    forwarded_tokens=u32,
)
reader_messages = st.one_of(
    st.builds(LeaseClaim, keys, st.binary(max_size=32)),
    st.builds(LeaseRenew, st.lists(keys, **few).map(tuple)),
    st.builds(LeaseRelease, keys, st.booleans(), st.lists(u32.map(Slot), **few).map(tuple)),
)
handles = st.lists(st.tuples(u32.map(Slot), u64.map(Generation)), **few)
statuses = st.builds(
    lambda handles, **rest: LeaseStatus(
        slots=tuple(slot for slot, _ in handles),
        generations=tuple(word for _, word in handles),
        **rest,
    ),
    handles,
    key=keys,
    state=st.sampled_from(LeaseState),
    mac=st.binary(max_size=32),
    kv_tokens=u32,
    readable_tokens=u32,
    output_position=u32,
    output_tokens=st.lists(u32, **few).map(tuple),
    first_digest=u32,
    digests=st.lists(st.integers(-(2**63), 2**63 - 1), **few).map(tuple),
    finished=st.booleans(),
    cached_tokens=u32,
    error=st.none() | errors,
)
arenas = st.builds(
    ArenaDescriptor,
    transport=texts,
    metadata=st.binary(max_size=50),
    base_address=u64,
    block_bytes=st.integers(1, 2**64 - 1),
    num_slots=st.integers(1, 2**32 - 1),
    generations_address=u64,
)
