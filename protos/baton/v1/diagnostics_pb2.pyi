from baton.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReadStepsRequest(_message.Message):
    __slots__ = ("last",)
    LAST_FIELD_NUMBER: _ClassVar[int]
    last: int
    def __init__(self, last: _Optional[int] = ...) -> None: ...

class ReadStepsResponse(_message.Message):
    __slots__ = ("history",)
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    history: StepHistory
    def __init__(self, history: _Optional[_Union[StepHistory, _Mapping]] = ...) -> None: ...

class BeginProfileRequest(_message.Message):
    __slots__ = ("steps",)
    STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: int
    def __init__(self, steps: _Optional[int] = ...) -> None: ...

class BeginProfileResponse(_message.Message):
    __slots__ = ("path", "error")
    PATH_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    path: str
    error: _common_pb2.ErrorDetail
    def __init__(self, path: _Optional[str] = ..., error: _Optional[_Union[_common_pb2.ErrorDetail, _Mapping]] = ...) -> None: ...

class EndProfileRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EndProfileResponse(_message.Message):
    __slots__ = ("path", "is_written", "error")
    PATH_FIELD_NUMBER: _ClassVar[int]
    IS_WRITTEN_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    path: str
    is_written: bool
    error: _common_pb2.ErrorDetail
    def __init__(self, path: _Optional[str] = ..., is_written: _Optional[bool] = ..., error: _Optional[_Union[_common_pb2.ErrorDetail, _Mapping]] = ...) -> None: ...

class StepHistory(_message.Message):
    __slots__ = ("steps", "summary")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    steps: _containers.RepeatedCompositeFieldContainer[Step]
    summary: StepSummary
    def __init__(self, steps: _Optional[_Iterable[_Union[Step, _Mapping]]] = ..., summary: _Optional[_Union[StepSummary, _Mapping]] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("number", "age_s", "took_s", "rows", "tokens", "prompt_tokens", "replayed")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    TOOK_S_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    number: int
    age_s: float
    took_s: float
    rows: int
    tokens: int
    prompt_tokens: int
    replayed: bool
    def __init__(self, number: _Optional[int] = ..., age_s: _Optional[float] = ..., took_s: _Optional[float] = ..., rows: _Optional[int] = ..., tokens: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., replayed: _Optional[bool] = ...) -> None: ...

class StepSummary(_message.Message):
    __slots__ = ("steps", "p50_s", "p90_s", "p99_s", "max_s", "window_s", "busy_s", "tokens", "prompt_tokens")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    P50_S_FIELD_NUMBER: _ClassVar[int]
    P90_S_FIELD_NUMBER: _ClassVar[int]
    P99_S_FIELD_NUMBER: _ClassVar[int]
    MAX_S_FIELD_NUMBER: _ClassVar[int]
    WINDOW_S_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    steps: int
    p50_s: float
    p90_s: float
    p99_s: float
    max_s: float
    window_s: float
    busy_s: float
    tokens: int
    prompt_tokens: int
    def __init__(self, steps: _Optional[int] = ..., p50_s: _Optional[float] = ..., p90_s: _Optional[float] = ..., p99_s: _Optional[float] = ..., max_s: _Optional[float] = ..., window_s: _Optional[float] = ..., busy_s: _Optional[float] = ..., tokens: _Optional[int] = ..., prompt_tokens: _Optional[int] = ...) -> None: ...
