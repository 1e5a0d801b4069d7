"""A `CoreMesh` of the oracle model whose reads go wrong by a script."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest
from support import core_mesh
from support.core_mesh import GRANT, ROUTER, CoreMesh, D, P
from support.fault_transport import FaultScript, FaultyReader
from support.faults import LocalBlocks

from baton.common.ids import RequestKey, TransferId, WorkerIdentity
from baton.common.messages import DecodeJob, PrefillJob, Submit
from baton.common.timing import DEFAULT_TIMING
from baton.engine.oracle import oracle_answer
from baton.kvtransfer.events import FromOwner, PeerConnected
from baton.kvtransfer.transport.base import MemoryRegion
from baton.worker.core import Effects

VOCAB_SIZE = 512
STEP_DEADLINE_S = 10.0


class FaultyMesh(CoreMesh):
    """`script` decides over the reads of the first decode worker from the prefill worker."""

    def __init__(self, model: Path, script: FaultScript, **sizes: Any) -> None:
        super().__init__(model, **sizes)
        self.script = script
        self._asked: dict[RequestKey, tuple[list[int], int]] = {}
        self.inject(D, P)

    def step(self, who: WorkerIdentity) -> None:
        """One step of one core, once its device is done with the one before."""
        self.engines[who].wait(STEP_DEADLINE_S)
        self.cores[who].step()

    def exchange(self) -> None:
        for who, core in self.cores.items():
            self.step(who)
            self.deliver(who)
            core.check_invariants()

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()

    def inject(self, reader: WorkerIdentity, owner: WorkerIdentity) -> None:
        arena = self.engines[reader].arena
        region = MemoryRegion(arena.base_address, arena.num_bytes, arena, device=arena.device)
        inner = self._transports[reader].connect(owner, self._described[owner])
        peer = FaultyReader(inner, LocalBlocks(region, arena.block_bytes), self.script)
        self.cores[reader].handle(PeerConnected(owner, peer))

    def ask(self, prompt: list[int], max_tokens: int, **flags: Any) -> RequestKey:
        key = self.submit(prompt, max_tokens, **flags)
        self._asked[key] = (prompt, max_tokens)
        return key

    def decode_job(self, key: RequestKey, prompt: list[int], max_tokens: int) -> Submit:
        return self.job(key, prompt, max_tokens, DecodeJob(P, "nowhere", GRANT))

    def take_blocks(self, num_tokens: int, seed: int) -> None:
        """P computes somebody else's prompt, which nobody is to pull."""
        prompt = random.Random(seed).choices(range(4, VOCAB_SIZE), k=num_tokens)
        self._next += 1
        key = RequestKey(TransferId(self._next.to_bytes(16, "big")), 1)
        self.send(P, self.job(key, prompt, 1, PrefillJob(None)))

    def replay(self, who: WorkerIdentity, effects: Effects) -> None:
        """Carry what a core left behind earlier: it was late."""
        self.records.extend(effects.records.get(ROUTER, []))
        for reader, status in effects.statuses:
            self.cores[reader].handle(FromOwner(who, status))

    def answer(self, key: RequestKey) -> list[int]:
        prompt, max_tokens = self._asked[key]
        return oracle_answer(prompt, max_tokens, VOCAB_SIZE)

    def is_right(self, key: RequestKey) -> bool:
        """A whole right answer, or a right beginning and an error."""
        tokens, whole = self.tokens(key), self.answer(key)
        if self.errors(key):
            return tokens == whole[: len(tokens)]
        return tokens == whole


class MeshMaker(Protocol):
    """The fixture `faulty_mesh`: meshes that are closed after the test."""

    def __call__(self, script: FaultScript | None = None, **sizes: Any) -> FaultyMesh: ...


def shorten_leases(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Leases of later meshes live so long, everything else as long as ever."""
    timing = replace(DEFAULT_TIMING, lease_first_term_s=seconds, lease_term_s=seconds)
    monkeypatch.setattr(core_mesh, "DEFAULT_TIMING", timing)
