"""Hand-over and leases over time: the two real cores on a manual clock."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.core_mesh import GRANT, ROUTER, CoreMesh, D, P
from support.oracle import Oracle

from baton.common.errors import PeerLost
from baton.common.ids import Generation, RequestKey, Slot, TransferId
from baton.common.messages import (
    Cancel,
    LeaseClaim,
    LeaseRelease,
    LeaseState,
    LeaseStatus,
    OutputRecord,
    PrefillJob,
    Submit,
)
from baton.common.sampling import SamplingParams
from baton.common.timing import DEFAULT_TIMING
from baton.engine.sequence import Chunk, Sequence
from baton.kvtransfer.events import (
    FromOwner,
    FromReader,
    LinkClosed,
    LinkOpened,
    PeerConnected,
    PeerDisconnected,
)
from baton.kvtransfer.grant import claim_mac, handles_mac
from baton.kvtransfer.transport.base import PeerReader, Read, ReadState
from baton.worker.core import Drain, FromRouter

PROMPT = list(range(10, 140))


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> list[int]:
    return Oracle(tiny_llama).greedy([PROMPT], 40)[0]


def at_rest(pair: CoreMesh) -> None:
    pair.expect_rest()


def test_a_request_crosses_and_leaves_nothing(tiny_llama: Path, expected: list[int]) -> None:
    pair = CoreMesh(tiny_llama)
    key = pair.submit(PROMPT, 40)
    pair.advance(6)
    assert pair.tokens(key) == expected
    at_rest(pair)


@pytest.mark.parametrize(
    "wait_s",
    [
        DEFAULT_TIMING.lease_first_term_s + 1,
        DEFAULT_TIMING.lease_term_s + DEFAULT_TIMING.renew_every_s + 1,
    ],
)
def test_a_lease_outlives_its_terms_while_the_reader_waits_for_room(
    wait_s: float, tiny_llama: Path, expected: list[int]
) -> None:
    pair = CoreMesh(tiny_llama, decode_blocks=12)
    # Holds the decode worker's room: 8 + 4 of 12 blocks, one token per exchange.
    hog = pair.submit(list(range(200, 455)), 128)
    pair.exchange()
    key = pair.submit(PROMPT, 40)
    # The lease opens at once, and the owner sweeps before a renewal of the same moment arrives.
    pair.exchange()
    # The hog decodes one token per step, so with long steps it is in nobody's hurry.
    pair.advance(wait_s, step_s=0.35)
    assert len(pair.tokens(key)) == 1, "only the prefill worker's own token is out"
    pair.advance(40)
    assert pair.tokens(key) == expected
    assert len(pair.tokens(hog)) == 128
    at_rest(pair)


def test_a_reader_that_never_comes_pins_for_one_term(tiny_llama: Path) -> None:
    pair = CoreMesh(tiny_llama)
    key = pair.submit(PROMPT, 40, to_decode=False)
    pair.advance(DEFAULT_TIMING.lease_first_term_s - 1)
    assert pair.prefill.num_requests == 1
    pair.advance(2)
    at_rest(pair)
    assert pair.errors(key) == [], "its first token was out: the decode side has the say"


@pytest.mark.parametrize(
    ("away_s", "survives"),
    [(DEFAULT_TIMING.link_grace_s - 1, True), (DEFAULT_TIMING.link_grace_s + 1, False)],
)
def test_a_lost_link_ends_leases_after_its_grace(
    away_s: float, survives: bool, tiny_llama: Path, expected: list[int]
) -> None:
    pair = CoreMesh(tiny_llama, decode_blocks=12)
    pair.submit(list(range(200, 455)), 128)
    pair.exchange()
    key = pair.submit(PROMPT, 40)
    pair.advance(1)
    pair.prefill.handle(LinkClosed(D))
    pair.advance(away_s, step_s=away_s / 20)
    pair.prefill.handle(LinkOpened(D))
    pair.advance(60)
    if survives:
        assert pair.tokens(key) == expected
    else:
        assert pair.errors(key) == ["lease_lost"]
    at_rest(pair)


def test_a_late_claim_and_a_late_release_of_an_ended_request_change_nothing(
    tiny_llama: Path, expected: list[int]
) -> None:
    pair = CoreMesh(tiny_llama)
    key = pair.submit(PROMPT, 40)
    pair.advance(6)
    pair.prefill.handle(FromReader(D, LeaseRelease(key)))
    pair.advance(1)
    assert pair.tokens(key) == expected
    at_rest(pair)


def test_a_deadline_ends_the_request_on_both_sides(tiny_llama: Path) -> None:
    pair = CoreMesh(tiny_llama)
    key = pair.submit(PROMPT, 800, time_left_s=2.0)
    pair.advance(3)
    assert pair.errors(key) == ["deadline_exceeded"]
    at_rest(pair)


def test_readable_blocks_cross_while_the_next_chunk_is_computed(tiny_llama: Path) -> None:
    pair = CoreMesh(tiny_llama, budget=32)
    key = pair.submit(PROMPT, 8)
    peer = next(iter(pair.decode.handovers.peers.values()))
    crossed = []
    while not pair.tokens(key):
        pair.exchange()
        crossed.append(peer.blocks_read)
    assert crossed[0] < crossed[2] < crossed[-1]
    pair.advance(2)
    assert len(pair.tokens(key)) == 8
    at_rest(pair)


class LateReader:
    """The real reader, whose reads need one more look before they are seen to have ended."""

    def __init__(self, inner: PeerReader) -> None:
        self.inner = inner
        self.seen: set[int] = set()

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def poll(self, read: Read) -> ReadState:
        if id(read) not in self.seen:
            self.seen.add(id(read))
            return ReadState.PENDING
        return self.inner.poll(read)


def test_bytes_are_counted_whoever_polls_the_read(tiny_llama: Path) -> None:
    """Reads that end between two looks at their pull count like any other."""
    pair = CoreMesh(tiny_llama)
    (peer,) = pair.decode.handovers.peers.values()
    pair.decode.handle(PeerConnected(P, LateReader(peer)))
    key = pair.submit(PROMPT, 8)
    pair.advance(3)
    (report,) = [record.handover for record in pair.records if record.handover is not None]
    assert len(pair.tokens(key)) == 8
    assert report.pulled_bytes == 5 * pair.engines[D].arena.block_bytes


class FrozenReader(LateReader):
    """Reads never end; only the end of the agent that posted them does."""

    def poll(self, read: Read) -> ReadState:
        return read.state


def freeze_pulls(pair: CoreMesh) -> None:
    (peer,) = pair.decode.handovers.peers.values()
    pair.decode.handle(PeerConnected(P, FrozenReader(peer)))


def test_quarantine_of_a_frozen_peer_ends_with_the_agent_that_posted(tiny_llama: Path) -> None:
    """Its slots come back, its link is dropped, and the other requests of the link are told."""
    pair = CoreMesh(tiny_llama)
    freeze_pulls(pair)
    late = pair.submit(PROMPT, 40)
    pair.advance(DEFAULT_TIMING.transfer_deadline_s + 0.3)
    assert pair.errors(late) == ["transfer_timeout"]
    assert pair.quarantined_blocks == 5
    assert pair.hangups == [], "a late read may still end by itself"
    waiting = pair.submit(PROMPT[::-1], 40)
    pair.advance(DEFAULT_TIMING.transfer_deadline_s)
    assert pair.hangups == [P]
    assert pair.errors(waiting) == ["peer_lost"]
    assert pair.quarantined_blocks == 0
    pair.advance(0.2)
    at_rest(pair)


def test_a_request_between_the_end_of_an_agent_and_the_end_of_its_link_is_served_by_the_next(
    tiny_llama: Path, expected: list[int]
) -> None:
    """Its owner may announce the lease over the link that is about to be dropped."""
    pair = CoreMesh(tiny_llama)
    (peer,) = pair.decode.handovers.peers.values()
    freeze_pulls(pair)
    pair.submit(PROMPT[::-1], 40)
    pair.advance(2 * DEFAULT_TIMING.transfer_deadline_s + 0.3)
    assert pair.hangups == [P]
    between = pair.submit(PROMPT, 40)
    pair.advance(0.3)
    assert pair.errors(between) == []
    pair.decode.handle(PeerDisconnected(P, PeerLost("the link was closed")))
    pair.connect()
    assert pair.decode.handovers.peers[P] is not peer
    pair.advance(6)
    assert pair.tokens(between) == expected
    at_rest(pair)


def test_quarantine_is_bounded_by_the_pool(tiny_llama: Path) -> None:
    """Cancelled pulls of a frozen peer may not eat the pool until they are old."""
    pair = CoreMesh(tiny_llama, prefill_blocks=1024, decode_blocks=1024)
    freeze_pulls(pair)
    # 5 % of 1,024 blocks, or one context of 1,024 tokens: 51 blocks, ten prompts of five.
    for number in range(10):
        key = pair.submit([number, *PROMPT[1:]], 40)
        pair.advance(0.2)
        pair.decode.handle(FromRouter(ROUTER, Cancel(key)))
        assert pair.quarantined_blocks == 5 * (number + 1)
    pair.advance(0.1)
    assert pair.hangups == []
    key = pair.submit([10, *PROMPT[1:]], 40)
    pair.advance(0.2)
    pair.decode.handle(FromRouter(ROUTER, Cancel(key)))
    pair.advance(0.2)
    assert pair.hangups == [P]
    assert pair.quarantined_blocks == 0


def test_a_draining_worker_ends_what_it_has_and_takes_nothing_new(
    tiny_llama: Path, expected: list[int]
) -> None:
    pair = CoreMesh(tiny_llama)
    running = pair.submit(PROMPT, 40)
    pair.exchange()
    pair.prefill.handle(Drain())
    pair.decode.handle(Drain())
    refused = pair.submit(PROMPT, 40)
    pair.advance(6)
    assert pair.tokens(running) == expected
    assert pair.errors(refused) == ["no_worker", "no_worker"]
    at_rest(pair)


def announced(
    key: RequestKey, num_blocks: int = 0, output_tokens: tuple[int, ...] = ()
) -> LeaseStatus:
    """An owner's word, with handles that it vouches for."""
    slots = tuple(Slot(index) for index in range(num_blocks))
    generations = (Generation(1),) * num_blocks
    return LeaseStatus(
        key=key,
        state=LeaseState.OPEN,
        slots=slots,
        generations=generations,
        mac=handles_mac(GRANT, key, reader=D, owner=P, slots=slots, generations=generations),
        kv_tokens=len(PROMPT),
        readable_tokens=len(PROMPT),
        output_tokens=output_tokens,
    )


@pytest.mark.parametrize("num_blocks", [1, 4, 6, 500])
def test_handles_of_another_number_of_blocks_end_the_request_also_once_it_is_queued(
    num_blocks: int, tiny_llama: Path
) -> None:
    """Fewer would be joined with KV that nobody wrote, more would be read past the table."""
    pair = CoreMesh(tiny_llama, decode_blocks=12)
    hog = pair.submit(list(range(200, 455)), 128)
    pair.exchange()
    key = pair.submit(PROMPT, 40)
    pair.exchange()
    pair.decode.handle(FromOwner(P, announced(key, num_blocks)))
    pair.advance(30)
    assert pair.errors(key) == ["internal"]
    assert len(pair.tokens(hog)) == 128
    at_rest(pair)


def test_a_first_token_outside_the_vocabulary_ends_the_request(tiny_llama: Path) -> None:
    pair = CoreMesh(tiny_llama, budget=32)
    key = pair.submit(PROMPT, 40)
    pair.exchange()
    pair.decode.handle(FromOwner(P, announced(key, output_tokens=(10**6,))))
    pair.advance(3)
    assert pair.errors(key) == ["internal"]
    at_rest(pair)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": math.nan},
        {"temperature": -1.0},
        {"min_p": 2.0},
        {"top_p": math.nan},
        {"repetition_penalty": 0.0},
        {"presence_penalty": math.inf},
        {"frequency_penalty": math.nan},
        {"logit_bias": ((3, math.inf),)},
        {"logit_bias": ((10**6, 1.0),)},
    ],
    ids=str,
)
def test_sampling_that_no_token_survives_is_refused_before_the_engine_sees_it(
    wrong: dict[str, Any], tiny_llama: Path
) -> None:
    pair = CoreMesh(tiny_llama)
    record = submit_alone(pair, SamplingParams(max_tokens=1, **wrong))
    assert record.error is not None
    assert record.error.reason == "invalid_request"
    assert record.error.field == next(iter(wrong))
    at_rest(pair)


@pytest.mark.parametrize("seconds", [math.nan, math.inf])
def test_times_that_never_come_are_refused(seconds: float, tiny_llama: Path) -> None:
    """A deadline that is not a number would never pass."""
    pair = CoreMesh(tiny_llama)
    for times in ({"age_s": seconds}, {"time_left_s": seconds}):
        record = submit_alone(pair, SamplingParams(max_tokens=1), **times)
        assert record.error is not None
        assert record.error.reason == "invalid_request"


def test_the_smallest_sampling_values_survive_their_way_as_32_bit_floats(tiny_llama: Path) -> None:
    pair = CoreMesh(tiny_llama)
    rounded_down = 0.009999999776482582
    sampling = SamplingParams(
        max_tokens=1, temperature=rounded_down, repetition_penalty=rounded_down
    )
    assert submit_alone(pair, sampling).error is None


def submit_alone(pair: CoreMesh, sampling: SamplingParams, **times: float) -> OutputRecord:
    """The prefill worker's one answer to a request that needs nobody else."""
    submit = Submit(
        key=RequestKey(TransferId(len(pair.records).to_bytes(16, "big")), 1),
        prompt_tokens=PROMPT,
        sampling=sampling,
        tenant_key=b"",
        age_s=0.0,
        time_left_s=10.0,
        job=PrefillJob(None),
    )
    pair.prefill.handle(FromRouter(ROUTER, replace(submit, **times)))  # type: ignore[arg-type]
    pair.advance(0.5)
    return pair.records[-1]


def test_a_reader_whom_the_router_did_not_name_is_told_no_handles(tiny_llama: Path) -> None:
    pair = CoreMesh(tiny_llama)
    key = pair.submit(PROMPT, 40, to_decode=False)
    pair.prefill.step()
    pair.prefill.take_effects()
    stranger = replace(D, incarnation="another life")
    its_own = claim_mac(GRANT, key, reader=stranger, owner=P)
    pair.prefill.handle(FromReader(stranger, LeaseClaim(key, its_own)))
    ((reader, status),) = pair.prefill.take_effects().statuses
    assert reader == stranger
    assert status.state is LeaseState.ENDED
    assert status.error is not None
    assert status.error.reason == "grant_refused"
    assert (status.slots, status.generations) == ((), ())


@pytest.mark.parametrize(
    "step_s", [DEFAULT_TIMING.lease_first_term_s + 1, DEFAULT_TIMING.lease_term_s + 1]
)
def test_a_long_step_of_the_owner_ends_no_lease(
    step_s: float, tiny_llama: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The opening is told after the step; the renewal that answers it cannot come before."""
    pair = CoreMesh(tiny_llama, budget=64)
    quick = pair.engines[P].step

    def slow(chunks: list[Chunk]) -> list[tuple[Sequence, int]]:
        pair.clock.advance(step_s)
        return quick(chunks)

    monkeypatch.setattr(pair.engines[P], "step", slow)
    key = pair.submit(PROMPT, 40)
    pair.advance(8)
    assert pair.errors(key) == []
    assert pair.tokens(key) == expected
    at_rest(pair)
