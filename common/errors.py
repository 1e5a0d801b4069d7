"""The error tree. Every error that a user can meet is one of these.

    BatonError
    ├── InvalidRequest           the client sent something that cannot be served
    │   ├── ContextLengthExceeded
    │   ├── UnsupportedField
    │   └── BodyTooLarge
    ├── ExceedsKvCapacity        fits the model, but no worker's arena
    ├── ModelNotFound
    ├── UnknownRequest
    ├── UnknownWorker            an operator named a worker that this router does not know
    ├── AlreadyExists
    ├── NoCapacity               try again later
    │   ├── NoWorker
    │   └── QueueFull
    ├── DeadlineExceeded
    ├── Cancelled
    ├── SlowReader               the client took nothing while tokens waited for it
    ├── WorkerLost               the worker that held the request is gone
    ├── TransferError            KV could not be handed over
    │   ├── HandshakeMismatch
    │   ├── GrantRefused
    │   ├── TransferTimeout
    │   ├── FenceFailed
    │   ├── DigestMismatch
    │   ├── LeaseLost
    │   └── PeerLost
    ├── ModelError               the model folder cannot be used
    ├── ConfigError              flags, environment or files
    └── InternalError            a bug in Baton

`reason` is stable and machine-readable; `common.status` maps each class to gRPC and HTTP.
Messages never hold prompt text.
"""

from typing import ClassVar


class BatonError(Exception):
    """An error with a defined answer. `retryable`: the same request may succeed elsewhere."""

    reason: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False

    def __init__(
        self, message: str, *, field: str | None = None, retry_after_s: float | None = None
    ):
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s


class InvalidRequest(BatonError):
    reason = "invalid_request"


class ContextLengthExceeded(InvalidRequest):
    reason = "context_length_exceeded"


class UnsupportedField(InvalidRequest):
    reason = "unsupported_field"


class BodyTooLarge(InvalidRequest):
    reason = "body_too_large"


class ExceedsKvCapacity(BatonError):
    reason = "exceeds_kv_capacity"


class ModelNotFound(BatonError):
    reason = "model_not_found"


class UnknownRequest(BatonError):
    reason = "unknown_request"


class UnknownWorker(BatonError):
    reason = "unknown_worker"


class AlreadyExists(BatonError):
    reason = "already_exists"


class NoCapacity(BatonError):
    reason = "no_capacity"
    retryable = True


class NoWorker(NoCapacity):
    reason = "no_worker"


class QueueFull(NoCapacity):
    reason = "queue_full"


class DeadlineExceeded(BatonError):
    reason = "deadline_exceeded"


class Cancelled(BatonError):
    reason = "cancelled"


class SlowReader(BatonError):
    reason = "slow_reader"


class WorkerLost(BatonError):
    reason = "worker_lost"
    retryable = True


class TransferError(BatonError):
    reason = "transfer_failed"
    retryable = True


class HandshakeMismatch(TransferError):
    reason = "handshake_mismatch"
    retryable = False


class GrantRefused(TransferError):
    reason = "grant_refused"
    retryable = False


class TransferTimeout(TransferError):
    reason = "transfer_timeout"


class FenceFailed(TransferError):
    reason = "fence_failed"


class DigestMismatch(TransferError):
    reason = "digest_mismatch"


class LeaseLost(TransferError):
    reason = "lease_lost"


class PeerLost(TransferError):
    reason = "peer_lost"


class ModelError(BatonError):
    reason = "model_error"


class ConfigError(BatonError):
    reason = "config_error"


class InternalError(BatonError):
    reason = "internal"


def all_errors() -> list[type[BatonError]]:
    """Every class of the tree, parents first."""
    found: list[type[BatonError]] = [BatonError]
    for cls in found:
        found.extend(cls.__subclasses__())
    return found


def from_reason(reason: str, message: str) -> BatonError:
    """The error that a peer named by its reason; an unknown reason is a bug or a newer peer."""
    for cls in all_errors():
        if cls.reason == reason:
            return cls(message)
    return InternalError(f"{reason}: {message}")
