"""The Python client: the gRPC services wrapped for people; needs grpcio and protobuf alone."""

from baton.client.admin import AdminClient
from baton.client.client import BatonClient, complete
from baton.client.replies import Chunk, Completion, Finish, Lease, Message, ModelCard, Worker

__all__ = [
    "AdminClient",
    "BatonClient",
    "Chunk",
    "Completion",
    "Finish",
    "Lease",
    "Message",
    "ModelCard",
    "Worker",
    "complete",
]
