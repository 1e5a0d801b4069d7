from baton.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AttachRequest(_message.Message):
    __slots__ = ("hello", "submit", "cancel", "heartbeat", "submit_part", "move", "stay", "set_draining", "reap")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_PART_FIELD_NUMBER: _ClassVar[int]
    MOVE_FIELD_NUMBER: _ClassVar[int]
    STAY_FIELD_NUMBER: _ClassVar[int]
    SET_DRAINING_FIELD_NUMBER: _ClassVar[int]
    REAP_FIELD_NUMBER: _ClassVar[int]
    hello: RouterHello
    submit: Submit
    cancel: Cancel
    heartbeat: Heartbeat
    submit_part: SubmitPart
    move: Move
    stay: Stay
    set_draining: SetDraining
    reap: Reap
    def __init__(self, hello: _Optional[_Union[RouterHello, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., submit_part: _Optional[_Union[SubmitPart, _Mapping]] = ..., move: _Optional[_Union[Move, _Mapping]] = ..., stay: _Optional[_Union[Stay, _Mapping]] = ..., set_draining: _Optional[_Union[SetDraining, _Mapping]] = ..., reap: _Optional[_Union[Reap, _Mapping]] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("hello", "frame", "load")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    hello: WorkerHello
    frame: StepFrame
    load: LoadReport
    def __init__(self, hello: _Optional[_Union[WorkerHello, _Mapping]] = ..., frame: _Optional[_Union[StepFrame, _Mapping]] = ..., load: _Optional[_Union[LoadReport, _Mapping]] = ...) -> None: ...

class RouterHello(_message.Message):
    __slots__ = ("router_id", "router_epoch", "live")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    ROUTER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    router_epoch: int
    live: _containers.RepeatedCompositeFieldContainer[LiveRequest]
    def __init__(self, router_id: _Optional[str] = ..., router_epoch: _Optional[int] = ..., live: _Optional[_Iterable[_Union[LiveRequest, _Mapping]]] = ...) -> None: ...

class LiveRequest(_message.Message):
    __slots__ = ("key", "next_position")
    KEY_FIELD_NUMBER: _ClassVar[int]
    NEXT_POSITION_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.RequestKey
    next_position: int
    def __init__(self, key: _Optional[_Union[_common_pb2.RequestKey, _Mapping]] = ..., next_position: _Optional[int] = ...) -> None: ...

class WorkerHello(_message.Message):
    __slots__ = ("identity", "role", "model", "link_address", "load", "pid")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LINK_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    identity: _common_pb2.WorkerIdentity
    role: _common_pb2.Role
    model: ModelInfo
    link_address: str
    load: LoadReport
    pid: int
    def __init__(self, identity: _Optional[_Union[_common_pb2.WorkerIdentity, _Mapping]] = ..., role: _Optional[_Union[_common_pb2.Role, str]] = ..., model: _Optional[_Union[ModelInfo, _Mapping]] = ..., link_address: _Optional[str] = ..., load: _Optional[_Union[LoadReport, _Mapping]] = ..., pid: _Optional[int] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "path", "fingerprint", "max_model_len", "vocab_size", "block_size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    fingerprint: str
    max_model_len: int
    vocab_size: int
    block_size: int
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., fingerprint: _Optional[str] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ..., block_size: _Optional[int] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("key", "prompt_token_ids", "sampling", "tenant_key", "age_s", "time_left_s", "prefill", "decode", "output_token_ids", "request_id")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TENANT_KEY_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    TIME_LEFT_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.RequestKey
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _common_pb2.SamplingParams
    tenant_key: bytes
    age_s: float
    time_left_s: float
    prefill: PrefillJob
    decode: DecodeJob
    output_token_ids: _containers.RepeatedScalarFieldContainer[int]
    request_id: str
    def __init__(self, key: _Optional[_Union[_common_pb2.RequestKey, _Mapping]] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., tenant_key: _Optional[bytes] = ..., age_s: _Optional[float] = ..., time_left_s: _Optional[float] = ..., prefill: _Optional[_Union[PrefillJob, _Mapping]] = ..., decode: _Optional[_Union[DecodeJob, _Mapping]] = ..., output_token_ids: _Optional[_Iterable[int]] = ..., request_id: _Optional[str] = ...) -> None: ...

class SubmitPart(_message.Message):
    __slots__ = ("key", "data", "is_last")
    KEY_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    IS_LAST_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.RequestKey
    data: bytes
    is_last: bool
    def __init__(self, key: _Optional[_Union[_common_pb2.RequestKey, _Mapping]] = ..., data: _Optional[bytes] = ..., is_last: _Optional[bool] = ...) -> None: ...

class PrefillJob(_message.Message):
    __slots__ = ("reader", "grant_key")
    READER_FIELD_NUMBER: _ClassVar[int]
    GRANT_KEY_FIELD_NUMBER: _ClassVar[int]
    reader: _common_pb2.WorkerIdentity
    grant_key: bytes
    def __init__(self, reader: _Optional[_Union[_common_pb2.WorkerIdentity, _Mapping]] = ..., grant_key: _Optional[bytes] = ...) -> None: ...

class DecodeJob(_message.Message):
    __slots__ = ("owner", "owner_link_address", "grant_key")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    OWNER_LINK_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    GRANT_KEY_FIELD_NUMBER: _ClassVar[int]
    owner: _common_pb2.WorkerIdentity
    owner_link_address: str
    grant_key: bytes
    def __init__(self, owner: _Optional[_Union[_common_pb2.WorkerIdentity, _Mapping]] = ..., owner_link_address: _Optional[str] = ..., grant_key: _Optional[bytes] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.RequestKey
    def __init__(self, key: _Optional[_Union[_common_pb2.RequestKey, _Mapping]] = ...) -> None: ...

class Move(_message.Message):
    __slots__ = ("key", "to", "reader", "grant_key")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    READER_FIELD_NUMBER: _ClassVar[int]
    GRANT_KEY_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.RequestKey
    to: _common_pb2.RequestKey
    reader: _common_pb2.WorkerIdentity
    grant_key: bytes
    def __init__(self, key: _Optional[_Union[_common_pb2.RequestKey, _Mapping]] = ..., to: _Optional[_Union[_common_pb2.RequestKey, _Mapping]] = ..., reader: _Optional[_Union[_common_pb2.WorkerIdentity, _Mapping]] = ..., grant_key: _Optional[bytes] = ...) -> None: ...

class Stay(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.RequestKey
    def __init__(self, key: _Optional[_Union[_common_pb2.RequestKey, _Mapping]] = ...) -> None: ...

class SetDraining(_message.Message):
    __slots__ = ("draining",)
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    draining: bool
    def __init__(self, draining: _Optional[bool] = ...) -> None: ...

class Reap(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[_common_pb2.RequestKey]
    def __init__(self, keys: _Optional[_Iterable[_Union[_common_pb2.RequestKey, _Mapping]]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StepFrame(_message.Message):
    __slots__ = ("records",)
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[OutputRecord]
    def __init__(self, records: _Optional[_Iterable[_Union[OutputRecord, _Mapping]]] = ...) -> None: ...

class OutputRecord(_message.Message):
    __slots__ = ("key", "position", "token_ids", "finish", "prefill", "handover", "error", "forwarded_tokens")
    KEY_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    FORWARDED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.RequestKey
    position: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish: _common_pb2.FinishReason
    prefill: PrefillReport
    handover: HandoverReport
    error: _common_pb2.ErrorDetail
    forwarded_tokens: int
    def __init__(self, key: _Optional[_Union[_common_pb2.RequestKey, _Mapping]] = ..., position: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., finish: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., prefill: _Optional[_Union[PrefillReport, _Mapping]] = ..., handover: _Optional[_Union[HandoverReport, _Mapping]] = ..., error: _Optional[_Union[_common_pb2.ErrorDetail, _Mapping]] = ..., forwarded_tokens: _Optional[int] = ...) -> None: ...

class PrefillReport(_message.Message):
    __slots__ = ("cached_tokens", "computed_tokens", "queue_s", "compute_s")
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    cached_tokens: int
    computed_tokens: int
    queue_s: float
    compute_s: float
    def __init__(self, cached_tokens: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., queue_s: _Optional[float] = ..., compute_s: _Optional[float] = ...) -> None: ...

class HandoverReport(_message.Message):
    __slots__ = ("pulled_blocks", "pulled_bytes", "transport", "cached_tokens", "pull_s", "owner_cached_tokens")
    PULLED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PULLED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PULL_S_FIELD_NUMBER: _ClassVar[int]
    OWNER_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    pulled_blocks: int
    pulled_bytes: int
    transport: str
    cached_tokens: int
    pull_s: float
    owner_cached_tokens: int
    def __init__(self, pulled_blocks: _Optional[int] = ..., pulled_bytes: _Optional[int] = ..., transport: _Optional[str] = ..., cached_tokens: _Optional[int] = ..., pull_s: _Optional[float] = ..., owner_cached_tokens: _Optional[int] = ...) -> None: ...

class LoadReport(_message.Message):
    __slots__ = ("blocks_total", "blocks_free", "blocks_cached", "blocks_leased", "requests_running", "requests_waiting", "tokens_pending", "draining", "leases", "blocks_quarantined", "preemptions", "steps", "stalled_s", "pinned_unowned_bytes", "counters")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_LEASED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_WAITING_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PENDING_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    STALLED_S_FIELD_NUMBER: _ClassVar[int]
    PINNED_UNOWNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    blocks_leased: int
    requests_running: int
    requests_waiting: int
    tokens_pending: int
    draining: bool
    leases: _containers.RepeatedCompositeFieldContainer[LeaseRow]
    blocks_quarantined: int
    preemptions: int
    steps: int
    stalled_s: float
    pinned_unowned_bytes: int
    counters: _containers.ScalarMap[str, int]
    def __init__(self, blocks_total: _Optional[int] = ..., blocks_free: _Optional[int] = ..., blocks_cached: _Optional[int] = ..., blocks_leased: _Optional[int] = ..., requests_running: _Optional[int] = ..., requests_waiting: _Optional[int] = ..., tokens_pending: _Optional[int] = ..., draining: _Optional[bool] = ..., leases: _Optional[_Iterable[_Union[LeaseRow, _Mapping]]] = ..., blocks_quarantined: _Optional[int] = ..., preemptions: _Optional[int] = ..., steps: _Optional[int] = ..., stalled_s: _Optional[float] = ..., pinned_unowned_bytes: _Optional[int] = ..., counters: _Optional[_Mapping[str, int]] = ...) -> None: ...

class LeaseRow(_message.Message):
    __slots__ = ("key", "owner", "reader", "blocks", "bytes", "age_s", "expires_in_s", "state", "request_id", "why", "router")
    KEY_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    READER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_S_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.RequestKey
    owner: str
    reader: str
    blocks: int
    bytes: int
    age_s: float
    expires_in_s: float
    state: str
    request_id: str
    why: str
    router: str
    def __init__(self, key: _Optional[_Union[_common_pb2.RequestKey, _Mapping]] = ..., owner: _Optional[str] = ..., reader: _Optional[str] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., age_s: _Optional[float] = ..., expires_in_s: _Optional[float] = ..., state: _Optional[str] = ..., request_id: _Optional[str] = ..., why: _Optional[str] = ..., router: _Optional[str] = ...) -> None: ...
