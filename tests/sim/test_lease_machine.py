"""The lease protocol under every order of events that Hypothesis finds (SM2).

Two prefill and two decode workers whose pools hold two prompts: steps, messages, cuts, crashes,
freezes, cancels, retries and moves in any order. No token may come from a wrong block, every slot
has its owner after each step, and once the faults are over everything ends and all slots are free.
"""

from collections.abc import Set
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sim.clients import VOCAB_SIZE, write_model
from sim.cluster import TIMING
from sim.lease_world import NAMES, LeaseWorld, Request
from sim.lives import DECODES, PREFILLS

ROUND_S = 0.2
# Every term, grace and deadline has passed several times.
ENOUGH_ROUNDS = 600
MOVE_ROUNDS = 20
FORGOTTEN_ROUNDS = 200
MAX_REQUESTS = 8

prefills, decodes, workers = map(st.sampled_from, (PREFILLS, DECODES, NAMES))
links = st.sampled_from(
    [(reader, owner) for reader in DECODES for owner in NAMES if reader != owner]
)
some_workers, some_links = st.sets(workers), st.sets(links, max_size=3)
outputs = st.sampled_from([1, 2, 4, 8, 12])
prompts = st.lists(st.integers(2, VOCAB_SIZE - 1), min_size=5, max_size=16)


class LeaseMachine(RuleBasedStateMachine):
    model: Path

    @initialize(
        first=st.lists(st.tuples(prefills, decodes, prompts, outputs), min_size=2, max_size=4)
    )
    def start(self, first: list[tuple[str, str, list[int], int]]) -> None:
        self.world = LeaseWorld(self.model)
        for prefill, decode, prompt, max_tokens in first:
            self.world.submit(prefill, decode, prompt, max_tokens)

    @property
    def open(self) -> list[Request]:
        return [r for r in self.world.requests if not r.has_ended and not r.has_failed]

    # --- requests ---

    @precondition(lambda self: len(self.world.requests) < MAX_REQUESTS)
    @rule(prefill=prefills, decode=decodes, prompt=prompts, max_tokens=outputs)
    def submit(self, prefill: str, decode: str, prompt: list[int], max_tokens: int) -> None:
        self.world.submit(prefill, decode, prompt, max_tokens)

    @precondition(lambda self: any(r.has_failed and not r.has_ended for r in self.world.requests))
    @rule(data=st.data(), prefill=prefills, decode=decodes, loses=st.sampled_from(["", "p", "d"]))
    def retry(self, data: st.DataObject, prefill: str, decode: str, loses: str) -> None:
        failed = [r for r in self.world.requests if r.has_failed and not r.has_ended]
        lost = {"": "", "p": prefill, "d": decode}[loses]
        self.world.begin(data.draw(st.sampled_from(failed)), prefill, decode, lost=lost)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), is_sure=st.sampled_from([False, False, True]))
    def cancel(self, data: st.DataObject, is_sure: bool) -> None:
        if is_sure:
            self.world.cancel(data.draw(st.sampled_from(self.open)))

    @precondition(lambda self: any(r.has_joined and r.moving_to is None for r in self.open))
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        joined = [r for r in self.open if r.has_joined and r.moving_to is None]
        self.world.move(data.draw(st.sampled_from(joined)))

    @precondition(lambda self: any(r.moving_to is not None for r in self.open))
    @rule(data=st.data(), is_sure=st.sampled_from([False, True]))
    def give_up_move(self, data: st.DataObject, is_sure: bool) -> None:
        if not is_sure:
            return
        moving = [r for r in self.open if r.moving_to is not None]
        self.world.fail_move(data.draw(st.sampled_from(moving)))

    # --- what goes on ---

    @rule(rounds=st.integers(1, 4))
    def go_on(self, rounds: int) -> None:
        for _ in range(rounds):
            self._round(0.05)

    @rule(rounds=st.integers(1, 4), still=some_workers, deaf=some_links)
    def go_on_in_part(self, rounds: int, still: set[str], deaf: set[tuple[str, str]]) -> None:
        """Some cores do not come round, over some links nothing comes."""
        for _ in range(rounds):
            self._round(0.05, still, deaf)

    @rule(seconds=st.sampled_from([TIMING.lease_first_term_s, TIMING.lease_term_s]), awake=workers)
    def time_passes_for_one(self, seconds: float, awake: str) -> None:
        """Terms end on a worker that hears of nobody; the others stand still."""
        for _ in range(1 + round(seconds / 0.5)):
            self.world.clock.advance(0.5)
            self.world.end_step(awake)
            self.world.step(awake)

    @rule(link=links, rounds=st.integers(2, 8))
    def owner_goes_its_way(self, link: tuple[str, str], rounds: int) -> None:
        """Its leases end unheard and its slots change hands; then its reader gets on alone."""
        self.time_passes_for_one(TIMING.lease_term_s, link[1])
        for _ in range(rounds):
            self._round(0.05, deaf={link})

    @rule(what=st.sampled_from(["step", "end step", "end reads", "control"]), worker=workers)
    def one_thing(self, what: str, worker: str) -> None:
        {
            "step": self.world.step,
            "end step": self.world.end_step,
            "end reads": self.world.end_reads,
            "control": self.world.take_control,
        }[what](worker)

    @rule(link=links, to_owner=st.booleans())
    def carry(self, link: tuple[str, str], to_owner: bool) -> None:
        self.world.carry(*link, to_owner=to_owner)

    # --- faults ---

    @rule(link=links, is_cut=st.booleans())
    def cut_or_restore(self, link: tuple[str, str], is_cut: bool) -> None:
        (self.world.cut_link if is_cut else self.world.restore_link)(*link)

    @rule(worker=workers, what=st.sampled_from(["crash", "freeze", "thaw", "thaw"]))
    def strike(self, worker: str, what: str) -> None:
        if what == "crash":
            self.world.crash_and_restart(worker)
        else:
            self.world.lives[worker].is_frozen = what == "freeze"

    # --- the end ---

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        world.cut.clear()
        for life in world.lives.values():
            life.is_frozen = False
        for number in range(ENOUGH_ROUNDS):
            self._round(ROUND_S)
            if number == MOVE_ROUNDS:
                self._give_up_what_cannot_end()
            if number >= FORGOTTEN_ROUNDS:
                self._give_up_what_was_forgotten()
            if number >= MOVE_ROUNDS and not any(
                life.core.num_requests for life in world.lives.values()
            ):
                break
        waiting = [r.key for r in self.open]
        assert waiting == [], "nothing breaks any more, and yet these do not end"
        for name, life in world.lives.items():
            assert life.core.num_requests == 0, name
            pool, prefix = life.engine.pool, life.engine.prefix
            assert pool.num_free + prefix.num_evictable == life.engine.num_blocks, name

    def _give_up_what_cannot_end(self) -> None:
        """As a router does by its deadlines: moves, and requests that one worker never heard of."""
        for request in self.open:
            if request.moving_to is not None:
                self.world.fail_move(request)
            if request.is_half:
                self.world.cancel(request)

    def _give_up_what_was_forgotten(self) -> None:
        """An owner remembers an ended lease for one term. A reader that first claims it later is
        told "not yet", and waits for its router's deadline; it holds nothing meanwhile."""
        for request in self.open:
            owner = self.world.lives[request.prefill]
            if not request.has_joined and owner.core.num_requests == 0:
                self.world.cancel(request)

    def _round(
        self,
        seconds: float,
        still: Set[str] = frozenset(),
        deaf: Set[tuple[str, str]] = frozenset(),
    ) -> None:
        world = self.world
        world.clock.advance(seconds)
        for name, life in world.lives.items():
            world.end_step(name)
            world.end_reads(name)
            if name in still:
                continue
            while life.control and not life.is_frozen:
                world.take_control(name)
            world.step(name)
        for link in world.links:
            for to_owner in (True, False):
                for _ in range(0 if link in deaf else 4):
                    world.carry(*link, to_owner=to_owner)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "oracle")


@pytest.fixture
def machine(model: Path) -> type[LeaseMachine]:
    LeaseMachine.model = model
    return LeaseMachine


def test_the_lease_protocol_in_any_order(machine: type[LeaseMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=100,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
