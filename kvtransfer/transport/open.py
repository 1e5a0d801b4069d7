"""A transport by the name that stands in the configuration."""

from baton.common.errors import ConfigError
from baton.common.ids import WorkerIdentity
from baton.kvtransfer.transport.base import Transport
from baton.kvtransfer.transport.nixl import NixlTransport


def open_transport(name: str, identity: WorkerIdentity) -> Transport:
    """The transport `name` of this worker. ConfigError for an unknown name or a missing wheel.

    The memory transport is not here: its fabric is shared by hand between servers of one process.
    """
    if name == NixlTransport.name:
        return NixlTransport(identity)
    raise ConfigError(f"no KV transport is called {name!r}: use --transport nixl")
