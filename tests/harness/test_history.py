"""The checkers notice each thing that they are there for: a checker that cannot fail checks
nothing."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from support.history import History, RequestLog
from support.rest_checks import (
    MEMORY_FLOOR_BYTES,
    Usage,
    bad_lines,
    expect_clean,
    expect_secret,
    unrest,
    usage,
)

from baton.common.clock import ManualClock
from baton.common.errors import BatonError, FenceFailed, TransferError, WorkerLost
from baton.common.messages import LoadReport

ANSWER = [11, 12, 13, 14]


@dataclass(frozen=True)
class Counted:
    completion_tokens: int


@dataclass(frozen=True)
class Piece:
    token_ids: Sequence[int]
    finish: Counted | None = None


async def pieces(*found: Piece, error: BatonError | None = None) -> AsyncIterator[Piece]:
    for piece in found:
        yield piece
    if error is not None:
        raise error


def oracle(log: RequestLog) -> list[int]:
    return ANSWER


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(100.0)


@pytest.fixture
def history(clock: ManualClock) -> History:
    return History(clock)


def submit(history: History) -> RequestLog:
    return history.submit("r1", [1, 2], max_tokens=4, deadline_s=10.0)


async def test_a_right_answer_in_pieces_is_no_violation(
    history: History, clock: ManualClock
) -> None:
    log = submit(history)
    await log.follow(pieces(Piece([11]), Piece([12, 13]), Piece([14], Counted(4))))
    history.check(oracle)
    assert history.violations(oracle) == []


async def test_right_tokens_and_then_an_allowed_error(history: History) -> None:
    log = submit(history)
    await log.follow(pieces(Piece([11, 12]), error=FenceFailed("moved")))
    history.check(oracle, allowed=[TransferError])
    assert history.violations(oracle) == ["r1: ended with FenceFailed (moved)"]
    assert history.violations(oracle, [WorkerLost]) == ["r1: ended with FenceFailed (moved)"]


def test_a_client_that_went_away_is_an_end(history: History) -> None:
    log = submit(history)
    log.received([11])
    log.cancelled()
    history.check(oracle)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([11, 13, 14], "token 1 is 13, the oracle says 12"),
        ([11, 11, 12, 13], "token 1 is 11, the oracle says 12"),
        ([12, 11, 13, 14], "token 0 is 12, the oracle says 11"),
        ([11, 12, 13, 99], "token 3 is 99, the oracle says 14"),
        ([11, 12, 13, 14, 15], "5 tokens, the whole answer has 4"),
        ([11, 12, 13], "a whole answer of 3 tokens, not 4"),
    ],
    ids=["lost", "twice", "swapped", "wrong", "too many", "too few"],
)
def test_tokens_that_are_not_the_oracles(history: History, tokens: list[int], said: str) -> None:
    log = submit(history)
    log.received(tokens)
    log.finished(len(tokens))
    with pytest.raises(AssertionError, match=f"r1: {said}"):
        history.check(oracle)


def never(log: RequestLog, clock: ManualClock) -> None:
    log.received([11])


def twice(log: RequestLog, clock: ManualClock) -> None:
    log.received(ANSWER)
    log.finished(4)
    log.failed(WorkerLost("late"))


def late(log: RequestLog, clock: ManualClock) -> None:
    clock.advance(11.5)
    log.received(ANSWER)
    log.finished(4)


def after_its_end(log: RequestLog, clock: ManualClock) -> None:
    log.received(ANSWER[:3])
    log.failed(WorkerLost("gone"))
    log.received(ANSWER[3:])


def with_a_wrong_count(log: RequestLog, clock: ManualClock) -> None:
    log.received(ANSWER)
    log.finished(3)


def with_a_wrong_token_before_an_error(log: RequestLog, clock: ManualClock) -> None:
    log.received([11, 99])
    log.failed(WorkerLost("gone"))


@pytest.mark.parametrize(
    ("story", "said"),
    [
        (never, "ended 0 times"),
        (twice, r"ended 2 times.*WorkerLost \(late\)"),
        (late, r"ended 1\.50 s after its deadline"),
        (after_its_end, "1 tokens after the end"),
        (with_a_wrong_count, "4 tokens, but usage says 3"),
        (with_a_wrong_token_before_an_error, "token 1 is 99"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_ends_that_may_not_be(
    history: History,
    clock: ManualClock,
    story: Callable[[RequestLog, ManualClock], None],
    said: str,
) -> None:
    story(submit(history), clock)
    with pytest.raises(AssertionError, match=said):
        history.check(oracle, allowed=[WorkerLost])


def test_an_end_within_a_second_of_the_deadline_is_in_time(
    history: History, clock: ManualClock
) -> None:
    log = submit(history)
    clock.advance(10.9)
    log.failed(WorkerLost("gone"))
    history.check(oracle, allowed=[WorkerLost])


def test_an_empty_history_is_checked_by_nobody(history: History) -> None:
    with pytest.raises(AssertionError, match="no request"):
        history.check(oracle)


def test_the_longest_gap_is_between_two_tokens(history: History, clock: ManualClock) -> None:
    log = submit(history)
    for pause_s in (5.0, 0.5, 2.0, 1.0):
        clock.advance(pause_s)
        log.received([11])
    assert history.longest_gap_s == 2.0


AT_REST = LoadReport(blocks_total=10, blocks_free=7, blocks_cached=3)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"blocks_free": 6}, "9 blocks free or cached of 10"),
        ({"blocks_leased": 1}, "1 blocks leased"),
        ({"blocks_quarantined": 2}, "2 blocks quarantined"),
        ({"requests_running": 1}, "1 requests running"),
        ({"requests_waiting": 1}, "1 requests waiting"),
        ({"pinned_unowned_bytes": 64}, "64 bytes pinned by nobody"),
    ],
)
def test_what_is_not_at_rest_is_named(changed: dict[str, int], said: str) -> None:
    assert unrest("d0", AT_REST) == []
    assert unrest("d0", replace(AT_REST, **changed)) == [f"d0: {said}"]


def test_growth_beyond_five_percent_and_a_floor_is_named() -> None:
    before = Usage(fds=100, threads=20, rss_bytes=10**9, tasks=10)
    assert before.grown_from(before) == []
    assert replace(before, fds=107, threads=23, tasks=12).grown_from(before) == []
    grown = replace(before, fds=108, threads=24, tasks=13, rss_bytes=2 * 10**9)
    assert len(grown.grown_from(before)) == 4
    within = int(10**9 * 1.05) + MEMORY_FLOOR_BYTES
    assert replace(before, rss_bytes=within).grown_from(before) == []
    assert replace(before, rss_bytes=within + 2**20).grown_from(before) != []


async def test_this_process_is_measured(tmp_path: Path) -> None:
    before = usage()
    assert before.rss_bytes > 2**20
    assert before.threads >= 1
    assert before.tasks >= 1
    stop = asyncio.Event()
    waiting = asyncio.create_task(stop.wait())
    with (tmp_path / "file").open("w"):
        during = usage()
    stop.set()
    await waiting
    assert (during.fds, during.tasks) == (before.fds + 1, before.tasks + 1)
    assert usage().fds == before.fds


def test_logs_that_tell_of_our_own_faults(tmp_path: Path) -> None:
    good = tmp_path / "d0.log"
    good.write_text('level=WARNING msg="d1 was lost"\nlevel=ERROR msg=lease_lost\n')
    expect_clean([good])
    bad = tmp_path / "p0.log"
    for line in (
        "Traceback (most recent call last):",
        "    AssertionError: slot 3 is lost",
        "Task exception was never retrieved",
        'level=CRITICAL msg="the engine thread failed"',
        "RuntimeWarning: coroutine 'x' was never awaited",
    ):
        bad.write_text(f"fine\n{line}\nfine\n")
        assert bad_lines(bad.read_text()) == [line]
        with pytest.raises(AssertionError, match=r"p0\.log"):
            expect_clean([good, bad])


def test_a_canary_in_a_log_is_found(tmp_path: Path) -> None:
    log = tmp_path / "router.log"
    canary = [411, 87, 300, 12]
    for harmless in ("port=411 pid=87 300 requests", "411 87", "1411 87 300"):
        log.write_text(harmless)
        expect_secret([log], texts=["the quick canary"], tokens=[canary])
    for leaked in ("tokens=[411, 87, 300]", "87 300 12", 'msg="the quick canary"'):
        log.write_text(f"fine\n{leaked}\n")
        with pytest.raises(AssertionError, match=r"router\.log: t"):
            expect_secret([log], texts=["the quick canary"], tokens=[canary])
