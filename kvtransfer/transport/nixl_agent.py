"""The part of NIXL that Baton uses, typed, over NIXL's own bindings.

NIXL's Python class fixes the pause of the progress thread at 0 µs, which burns a core per agent,
logs to stdout, and hands out objects that keep an agent alive after it was dropped. Here handles
are plain numbers, and `destroy` is the end of the agent, which a fence may rest on.
"""

import importlib
import logging
import weakref
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from baton.common.errors import ConfigError, PeerLost, TransferError
from baton.kvtransfer.transport.base import MemoryRegion, ReadState

BINDINGS: Final = ("nixl_cu12._bindings", "nixl_cu13._bindings")


@cache
def load_bindings() -> Any:
    """NIXL's bindings from whichever wheel is installed. ConfigError names the extra to install."""
    raise_exceptions = logging.raiseExceptions
    causes: list[str] = []
    try:
        for module in BINDINGS:
            try:
                return importlib.import_module(module)
            except ImportError as missing:
                causes.append(f"{module}: {missing}")
    finally:
        # Importing NIXL switches this off for the whole process.
        logging.raiseExceptions = raise_exceptions
    raise ConfigError(
        "the nixl transport needs NIXL, and neither wheel can be imported "
        f"({'; '.join(causes)}): pip install 'kvbaton[nixl-cu12]' or 'kvbaton[nixl-cu13]'"
    )


@cache
def _nixl_errors() -> tuple[type[Exception], ...]:
    found = vars(load_bindings()).values()
    return tuple(c for c in found if isinstance(c, type) and issubclass(c, Exception))


class NixlAgent:
    """One NIXL agent with a UCX backend. Used by one thread at a time.

    `progress_delay_us` is the pause of the progress thread in µs; None runs none, and the agent
    moves only inside `state`. An agent that others connect to needs the thread. Every method
    raises TransferError, PeerLost where NIXL says that the peer disconnected.
    """

    def __init__(self, name: str, *, progress_delay_us: int | None, telemetry: bool) -> None:
        self._nixl = load_bindings()
        self.name = name
        config = self._nixl.nixlAgentConfig()
        config.useProgThread = progress_delay_us is not None
        config.pthrDelay = progress_delay_us or 0
        config.useListenThread = False
        config.syncMode = self._nixl.NIXL_THREAD_SYNC_NONE
        config.captureTelemetry = telemetry
        self._regions: list[MemoryRegion] = []
        try:
            self._agent: Any = self._nixl.nixlAgent(name, config)
            self._agent.createBackend("UCX", {})
        except _nixl_errors() as error:
            raise self._failure("create its UCX backend", error) from error

    def register(self, region: MemoryRegion) -> None:
        """Pins the region and holds it until `destroy`."""
        row = (region.address, region.num_bytes, region.device or 0, "")
        try:
            self._agent.registerMem(
                self._nixl.nixlRegDList(self._segment(region.device), [row]), []
            )
        except _nixl_errors() as error:
            raise self._failure(f"register {region}", error) from error
        self._regions.append(region)

    def metadata(self) -> bytes:
        """What a peer loads to read the registered regions; complete once all are registered."""
        try:
            return bytes(self._agent.getLocalMD())
        except _nixl_errors() as error:
            raise self._failure("export its metadata", error) from error

    def load_peer(self, metadata: bytes) -> str:
        """Introduces a peer by its metadata, returns the agent name that it holds."""
        try:
            return bytes(self._agent.loadRemoteMD(metadata)).decode(errors="replace")
        except _nixl_errors() as error:
            raise self._failure(f"load {len(metadata)} bytes of peer metadata", error) from error

    def connect(self, peer: str) -> None:
        """Starts the connection; it is up once a first transfer is DONE."""
        try:
            self._agent.makeConnection(peer, [])
        except _nixl_errors() as error:
            raise self._failure(f"connect to {peer}", error) from error

    def prepare(
        self, peer: str | None, base: int, item_bytes: int, num_items: int, device: int | None
    ) -> int:
        """A list of equal descriptors, item i at base + i * item_bytes, for `post` to index.

        Remote items for `peer`, local ones for None.
        """
        rows = np.empty((num_items, 3), dtype=np.uint64)
        rows[:, 0] = np.uint64(base) + np.arange(num_items, dtype=np.uint64) * np.uint64(item_bytes)
        rows[:, 1] = item_bytes
        rows[:, 2] = device or 0
        try:
            items = self._nixl.nixlXferDList(self._segment(device), rows)
            side = self._nixl.NIXL_INIT_AGENT if peer is None else peer
            return int(self._agent.prepXferDlist(side, items, []))
        except _nixl_errors() as error:
            raise self._failure(f"prepare {num_items} descriptors", error) from error

    def create_read(
        self, local: int, local_items: npt.NDArray[np.int32], remote: int,
        remote_items: npt.NDArray[np.int32],
    ) -> int:  # fmt: skip
        """A transfer from remote_items[i] to local_items[i], not yet posted."""
        try:
            return int(
                self._agent.makeXferReq(
                    self._nixl.NIXL_READ, local, local_items, remote, remote_items, b"", [], False
                )
            )
        except _nixl_errors() as error:
            raise self._failure(f"create a read of {len(local_items)} items", error) from error

    def post(self, handle: int) -> ReadState:
        try:
            return self._state(self._agent.postXferReq(handle, b""))
        except _nixl_errors() as error:
            raise self._failure("post a read", error) from error

    def state(self, handle: int) -> ReadState:
        """Drives all transfers of the agent and says how this one stands."""
        try:
            return self._state(self._agent.getXferStatus(handle))
        except _nixl_errors() as error:
            raise self._failure("read", error) from error

    def num_bytes(self, handle: int) -> int:
        """The bytes that NIXL's telemetry counted for a transfer that is DONE."""
        try:
            return int(self._agent.getXferTelemetry(handle).totalBytes)
        except _nixl_errors() as error:
            raise self._failure("count the bytes of a read", error) from error

    def release(self, handle: int) -> None:
        """Frees a transfer. Not a fence: what is in flight may still land."""
        try:
            self._agent.releaseXferReq(handle)
        except _nixl_errors() as error:
            raise self._failure("release a read", error) from error

    def destroy(self) -> None:
        """Ends the agent with all it posted; nothing lands after this returns. Idempotent."""
        if self._agent is None:
            return
        gone = weakref.ref(self._agent)
        self._agent = None
        assert gone() is None, f"{self.name} outlives its end: quarantine would not be safe"
        self._regions.clear()

    def _segment(self, device: int | None) -> Any:
        return self._nixl.DRAM_SEG if device is None else self._nixl.VRAM_SEG

    def _state(self, status: Any) -> ReadState:
        if status == self._nixl.NIXL_SUCCESS:
            return ReadState.DONE
        return ReadState.PENDING if status == self._nixl.NIXL_IN_PROG else ReadState.FAILED

    def _failure(self, what: str, error: Exception) -> TransferError:
        lost = isinstance(error, self._nixl.nixlRemoteDisconnectError)
        kind = PeerLost if lost else TransferError
        return kind(f"NIXL agent {self.name} could not {what}: {error}")
