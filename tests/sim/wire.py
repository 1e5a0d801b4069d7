"""Messages as they cross: as they are, or through the codecs and protobuf's bytes."""

from baton.common.control_codec import (
    load_from_pb,
    load_to_pb,
    record_from_pb,
    record_to_pb,
    router_hello_from_pb,
    router_hello_to_pb,
    router_message_from_pb,
    router_message_to_pb,
)
from baton.common.messages import (
    LeaseStatus,
    LoadReport,
    OutputRecord,
    RouterHello,
    RouterMessage,
)
from baton.kvtransfer.link_codec import (
    ReaderMessage,
    reader_message_from_pb,
    reader_message_to_pb,
    status_from_pb,
    status_to_pb,
)
from baton.v1 import kv_pb2, worker_pb2


class Wire:
    """`is_encoded`: nothing crosses that protobuf does not carry."""

    def __init__(self, *, is_encoded: bool) -> None:
        self._is_encoded = is_encoded

    def reader_message(self, message: ReaderMessage) -> ReaderMessage:
        if not self._is_encoded:
            return message
        data = reader_message_to_pb(message).SerializeToString()
        return reader_message_from_pb(kv_pb2.LinkRequest.FromString(data))

    def status(self, status: LeaseStatus) -> LeaseStatus:
        if not self._is_encoded:
            return status
        data = status_to_pb(status).status.SerializeToString()
        return status_from_pb(kv_pb2.LeaseStatus.FromString(data))

    def router_message(self, message: RouterMessage) -> RouterMessage:
        if not self._is_encoded:
            return message
        data = router_message_to_pb(message).SerializeToString()
        decoded = router_message_from_pb(worker_pb2.AttachRequest.FromString(data))
        assert decoded is not None, "only a heartbeat is no message"
        return decoded

    def hello(self, hello: RouterHello) -> RouterHello:
        if not self._is_encoded:
            return hello
        data = router_hello_to_pb(hello).SerializeToString()
        return router_hello_from_pb(worker_pb2.RouterHello.FromString(data))

    def record(self, record: OutputRecord) -> OutputRecord:
        if not self._is_encoded:
            return record
        data = record_to_pb(record).SerializeToString()
        return record_from_pb(worker_pb2.OutputRecord.FromString(data))

    def load(self, load: LoadReport) -> LoadReport:
        if not self._is_encoded:
            return load
        data = load_to_pb(load).SerializeToString()
        return load_from_pb(worker_pb2.LoadReport.FromString(data))
