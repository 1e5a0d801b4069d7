"""F21: one bit of a KV block flips between its digest and its use, in a whole cluster."""

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.cluster import transports
from support.fault_transport import FaultScript, faulty
from support.faults import FlipBit
from support.figures import Figure
from support.trials import Trial, counters, prompt_of, trial

from baton.common import metric_names as names
from baton.common.ids import Slot
from baton.worker.server import WorkerServer

BLOCK = 32
PROMPT = 5 * BLOCK + 7
# 64 bytes of KV per token of the oracle model.
BLOCK_BYTES = 64 * BLOCK


class Flips:
    """One flip per prompt, at a place drawn anew: `times` says how many there were."""

    def __init__(self, run: Trial, script: FaultScript) -> None:
        self.run = run
        self.script = script
        self.times = 0
        self._draw = random.Random(21)
        self._is_due = False

    def next(self) -> None:
        """The next prompt is hit."""
        self._is_due = True

    def place(self) -> tuple[int, int, int]:
        """Block, byte and bit."""
        draw = self._draw
        return draw.randrange(5), draw.randrange(BLOCK_BYTES), draw.randrange(8)

    def in_flight(self) -> None:
        block, byte, bit = self.place()
        self.script.next(FlipBit(block=block, byte=byte, bit=bit))
        self.times += 1

    def at_owner(self) -> None:
        """P has digested and sampled, and told nobody."""
        if self._is_due:
            worker = self._worker()
            block, byte, bit = self.place()
            flip(worker, worker.core._owner.leased[-1][block], byte, bit)
            self._hit()

    def at_reader(self) -> None:
        """A block has passed its fence on D, and others are still to come."""
        worker = self._worker()
        for request in worker.core._requests.values():
            if self._is_due and request.pull is not None and request.pull.pulled_bytes:
                _, byte, bit = self.place()
                flip(worker, request.sequence.slots[0], byte, bit)
                self._hit()

    def _hit(self) -> None:
        self._is_due = False
        self.times += 1

    def _worker(self) -> WorkerServer:
        here = threading.current_thread()
        (worker,) = (each for each in self.run.cluster.workers if each._thread._thread is here)
        return worker


def flip(worker: WorkerServer, slot: Slot, byte: int, bit: int) -> None:
    block = worker.engine.arena.tensor[slot].view(-1).view(torch.uint8)
    block[byte] ^= 1 << bit


def expect_sound_caches(run: Trial) -> None:
    for worker in run.cluster.workers:
        assert worker.engine.digests is not None
        cached = [block.slot for block in worker.engine.prefix.blocks()]
        assert worker.engine.digests.mismatches(cached) == [], "a damaged block is cached"


PLACES: dict[str, Callable[[Flips], None]] = {
    "in P's pool": lambda flips: flips.run.at("p.after_first_token", flips.at_owner),
    "in flight": lambda flips: None,
    "in D's pool": lambda flips: flips.run.at("d.mid_pull", flips.at_reader),
}


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("count", [6, pytest.param(100, marks=pytest.mark.slow_fault)])
async def test_f21_a_flipped_bit_is_found_before_a_token_depends_on_it(
    count: int, where: str, oracle_model: Path, redis_url: str, figure: Figure
) -> None:
    """All are detected: counted where the bytes were, out of both caches, the answers exact."""
    script = FaultScript()
    # In D's pool a block waits for the chunks behind it.
    chunk = BLOCK if where == "in D's pool" else 2048
    async with trial(
        oracle_model,
        redis_url,
        factory=faulty(transports("memory"), script),
        kv_digest=True,
        max_num_batched_tokens=chunk,
    ) as run:
        flips = Flips(run, script)
        PLACES[where](flips)
        (prefill,), (decode,) = run.cluster.prefills, run.cluster.decodes
        for number in range(count):
            if where == "in flight":
                flips.in_flight()
            else:
                flips.next()
            log = await run.ask(prompt_of(PROMPT, number), max_tokens=8)
            assert flips.times == number + 1, "nothing was flipped: the check would say nothing"
            assert run.report(log).attempts == 2
            assert counters(decode)[names.DIGEST_MISMATCHES] == number + 1
            if where == "in P's pool":
                # Told by D, or, where the router's cancel came first, found by P's own check.
                assert counters(prefill)[names.DIGEST_MISMATCHES] == number + 1
        again = await run.ask(prompt_of(PROMPT, 0), max_tokens=8)
        assert run.report(again).attempts == 1
        expect_sound_caches(run)
        figure(f"F21: flipped bits {where} detected, of {count}", flips.times, "")


@pytest.mark.parametrize("side", ["P", "D"])
async def test_f21_a_cached_block_that_rots_is_no_hit(
    side: str, oracle_model: Path, redis_url: str
) -> None:
    """The next request with the same prompt does not use it, and pays with a recompute."""
    async with trial(oracle_model, redis_url, kv_digest=True) as run:
        (prefill,), (decode,) = run.cluster.prefills, run.cluster.decodes
        worker = prefill if side == "P" else decode
        await run.ask(prompt_of(PROMPT, 1), max_tokens=8)
        rotten = next(iter(worker.engine.prefix.blocks())).slot
        flip(worker, rotten, 100, 3)
        await run.ask(prompt_of(PROMPT, 1), max_tokens=8)
        assert counters(worker)[names.DIGEST_MISMATCHES] == 1
        expect_sound_caches(run)
