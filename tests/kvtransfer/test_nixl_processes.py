"""NIXL between real processes: bytes arrive, and a dead owner is noticed instead of waited for."""

import multiprocessing as mp
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
from support.kv_processes import (
    BLOCK_BYTES,
    NUM_SLOTS,
    READ_LIMIT_S,
    run_bereaved_reader,
    run_late_reader,
    run_owner,
    run_reader,
)

ANSWER_LIMIT_S = 20.0


@dataclass
class Child:
    process: BaseProcess
    pipe: Connection

    def answer(self) -> Any:
        assert self.pipe.poll(ANSWER_LIMIT_S), f"{self.process.name} hangs"
        return self.pipe.recv()


@pytest.fixture
def start() -> Iterator[Callable[..., Child]]:
    context = mp.get_context("spawn")
    children: list[Child] = []

    def run(target: Callable[..., None], *args: object) -> Child:
        here, there = context.Pipe()
        process = context.Process(target=target, args=(there, *args), name=target.__name__)
        process.start()
        there.close()
        children.append(Child(process, here))
        return children[-1]

    yield run
    for child in children:
        child.process.kill()
        child.process.join()
        child.process.close()
        child.pipe.close()


@pytest.mark.parametrize("fabric", ["all", "tcp"])
def test_bytes_cross_between_processes(
    start: Callable[..., Child], monkeypatch: pytest.MonkeyPatch, fabric: str
) -> None:
    monkeypatch.setenv("UCX_TLS", fabric)
    owner, reader = start(run_owner, 5), start(run_reader)
    descriptor, expected, words = owner.answer()
    reader.pipe.send(descriptor)
    assert reader.answer() == "connected"
    assert reader.answer() == (expected, NUM_SLOTS * BLOCK_BYTES, words)
    owner.pipe.send("stop")
    for child in (owner, reader):
        child.process.join(ANSWER_LIMIT_S)
        assert child.process.exitcode == 0


def test_an_owner_killed_in_the_middle_fails_the_read(
    start: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Over TCP the owner's process has a part in each read, so a stopped owner holds it open.
    monkeypatch.setenv("UCX_TLS", "tcp")
    owner, reader = start(run_owner, 5), start(run_bereaved_reader)
    reader.pipe.send(owner.answer()[0])
    assert reader.answer() == "connected"

    pid = owner.process.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    reader.pipe.send("owner stopped")
    assert reader.answer() == ("READING", NUM_SLOTS)

    owner.process.kill()
    owner.process.join()
    reader.pipe.send("owner killed")
    state, failure, unsafe, left, seconds = reader.answer()
    assert state == "FAILED"
    assert "the blocks could not be read" in failure
    assert "DISCONNECT" in failure
    assert unsafe == NUM_SLOTS, "what failed half-way is unsafe until its agent is destroyed"
    assert left == 0
    assert seconds < READ_LIMIT_S


@pytest.mark.parametrize("fabric", ["all", "tcp"])
def test_an_owner_that_died_is_an_error_to_read_and_to_connect(
    start: Callable[..., Child], monkeypatch: pytest.MonkeyPatch, fabric: str
) -> None:
    monkeypatch.setenv("UCX_TLS", fabric)
    owner, reader = start(run_owner, 5), start(run_late_reader)
    reader.pipe.send(owner.answer()[0])
    assert reader.answer() == "connected"
    owner.process.kill()
    owner.process.join()
    reader.pipe.send("owner killed")

    state, seconds = reader.answer()
    assert state == "FAILED"
    assert seconds < READ_LIMIT_S
    ended, seconds = reader.answer()
    assert ended in ("TransferError", "PeerLost")
    assert seconds < READ_LIMIT_S
