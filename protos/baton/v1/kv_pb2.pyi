from baton.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LeaseState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEASE_STATE_UNSPECIFIED: _ClassVar[LeaseState]
    LEASE_STATE_NOT_YET: _ClassVar[LeaseState]
    LEASE_STATE_OPEN: _ClassVar[LeaseState]
    LEASE_STATE_ENDED: _ClassVar[LeaseState]
LEASE_STATE_UNSPECIFIED: LeaseState
LEASE_STATE_NOT_YET: LeaseState
LEASE_STATE_OPEN: LeaseState
LEASE_STATE_ENDED: LeaseState

class LinkRequest(_message.Message):
    __slots__ = ("hello", "claim", "renew", "release")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    hello: ReaderHello
    claim: LeaseClaim
    renew: LeaseRenew
    release: LeaseRelease
    def __init__(self, hello: _Optional[_Union[ReaderHello, _Mapping]] = ..., claim: _Optional[_Union[LeaseClaim, _Mapping]] = ..., renew: _Optional[_Union[LeaseRenew, _Mapping]] = ..., release: _Optional[_Union[LeaseRelease, _Mapping]] = ...) -> None: ...

class LinkResponse(_message.Message):
    __slots__ = ("hello", "status", "refusal")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    hello: OwnerHello
    status: LeaseStatus
    refusal: LinkRefusal
    def __init__(self, hello: _Optional[_Union[OwnerHello, _Mapping]] = ..., status: _Optional[_Union[LeaseStatus, _Mapping]] = ..., refusal: _Optional[_Union[LinkRefusal, _Mapping]] = ...) -> None: ...

class ProtocolRange(_message.Message):
    __slots__ = ("min", "max")
    MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    min: int
    max: int
    def __init__(self, min: _Optional[int] = ..., max: _Optional[int] = ...) -> None: ...

class FingerprintField(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: str
    def __init__(self, name: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...

class ReaderHello(_message.Message):
    __slots__ = ("protocol", "identity", "owner", "fingerprint", "fields", "transport")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    protocol: ProtocolRange
    identity: _common_pb2.WorkerIdentity
    owner: _common_pb2.WorkerIdentity
    fingerprint: str
    fields: _containers.RepeatedCompositeFieldContainer[FingerprintField]
    transport: str
    def __init__(self, protocol: _Optional[_Union[ProtocolRange, _Mapping]] = ..., identity: _Optional[_Union[_common_pb2.WorkerIdentity, _Mapping]] = ..., owner: _Optional[_Union[_common_pb2.WorkerIdentity, _Mapping]] = ..., fingerprint: _Optional[str] = ..., fields: _Optional[_Iterable[_Union[FingerprintField, _Mapping]]] = ..., transport: _Optional[str] = ...) -> None: ...

class OwnerHello(_message.Message):
    __slots__ = ("protocol", "identity", "fingerprint", "arena")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ARENA_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    identity: _common_pb2.WorkerIdentity
    fingerprint: str
    arena: ArenaDescriptor
    def __init__(self, protocol: _Optional[int] = ..., identity: _Optional[_Union[_common_pb2.WorkerIdentity, _Mapping]] = ..., fingerprint: _Optional[str] = ..., arena: _Optional[_Union[ArenaDescriptor, _Mapping]] = ...) -> None: ...

class ArenaDescriptor(_message.Message):
    __slots__ = ("transport", "metadata", "base_address", "block_bytes", "num_slots", "generations_address", "digest")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    BASE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    transport: str
    metadata: bytes
    base_address: int
    block_bytes: int
    num_slots: int
    generations_address: int
    digest: bytes
    def __init__(self, transport: _Optional[str] = ..., metadata: _Optional[bytes] = ..., base_address: _Optional[int] = ..., block_bytes: _Optional[int] = ..., num_slots: _Optional[int] = ..., generations_address: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class LinkRefusal(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: _common_pb2.ErrorDetail
    def __init__(self, error: _Optional[_Union[_common_pb2.ErrorDetail, _Mapping]] = ...) -> None: ...

class LeaseClaim(_message.Message):
    __slots__ = ("key", "mac")
    KEY_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.RequestKey
    mac: bytes
    def __init__(self, key: _Optional[_Union[_common_pb2.RequestKey, _Mapping]] = ..., mac: _Optional[bytes] = ...) -> None: ...

class LeaseRenew(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[_common_pb2.RequestKey]
    def __init__(self, keys: _Optional[_Iterable[_Union[_common_pb2.RequestKey, _Mapping]]] = ...) -> None: ...

class LeaseRelease(_message.Message):
    __slots__ = ("key", "joined", "bad_slots")
    KEY_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    BAD_SLOTS_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.RequestKey
    joined: bool
    bad_slots: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, key: _Optional[_Union[_common_pb2.RequestKey, _Mapping]] = ..., joined: _Optional[bool] = ..., bad_slots: _Optional[_Iterable[int]] = ...) -> None: ...

class LeaseStatus(_message.Message):
    __slots__ = ("key", "state", "slots", "generations", "readable_tokens", "output_token_ids", "output_position", "finished", "error", "cached_tokens", "kv_tokens", "mac", "digests", "first_digest")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    READABLE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_POSITION_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    FIRST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.RequestKey
    state: LeaseState
    slots: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    readable_tokens: int
    output_token_ids: _containers.RepeatedScalarFieldContainer[int]
    output_position: int
    finished: bool
    error: _common_pb2.ErrorDetail
    cached_tokens: int
    kv_tokens: int
    mac: bytes
    digests: _containers.RepeatedScalarFieldContainer[int]
    first_digest: int
    def __init__(self, key: _Optional[_Union[_common_pb2.RequestKey, _Mapping]] = ..., state: _Optional[_Union[LeaseState, str]] = ..., slots: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ..., readable_tokens: _Optional[int] = ..., output_token_ids: _Optional[_Iterable[int]] = ..., output_position: _Optional[int] = ..., finished: _Optional[bool] = ..., error: _Optional[_Union[_common_pb2.ErrorDetail, _Mapping]] = ..., cached_tokens: _Optional[int] = ..., kv_tokens: _Optional[int] = ..., mac: _Optional[bytes] = ..., digests: _Optional[_Iterable[int]] = ..., first_digest: _Optional[int] = ...) -> None: ...
