"""Failpoints: a process stops, dies, waits or fails at the very place, and only when armed."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.common import failpoints
from baton.common.clock import ManualClock, SystemClock
from baton.common.errors import ConfigError, InternalError
from baton.common.failpoints import NAMES, armed, install, reach, reach_async, uninstall

HERE, THERE = "d.mid_pull", "d.before_join"
WAIT_LIMIT_S = 10.0

# Reaches a place N times, saying so before and after.
PROGRAM = """
import sys
from baton.common.clock import SystemClock
from baton.common.failpoints import install, reach
install(sys.argv[1], SystemClock())
for number in range(1, 4):
    print("before", number, flush=True)
    reach("d.mid_pull")
    print("after", number, flush=True)
"""


@pytest.fixture(autouse=True)
def nothing_stays_armed() -> Iterator[None]:
    yield
    uninstall()


def arm(folder: Path, text: str, name: str = HERE) -> None:
    """Whole or not at all, as whoever arms a running process must write it."""
    scratch = folder / f"{name}.new"
    scratch.write_text(text)
    scratch.rename(folder / f"{name}.arm")


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + WAIT_LIMIT_S
    never = threading.Event()
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name}"
        never.wait(0.005)


def test_nothing_is_armed_by_default(tmp_path: Path) -> None:
    install(None, SystemClock())
    assert failpoints._failpoints is None
    reach(HERE)


def test_an_installed_folder_without_orders_changes_nothing(tmp_path: Path) -> None:
    install(str(tmp_path), SystemClock())
    for name in NAMES:
        reach(name)
    assert list(tmp_path.iterdir()) == []


def test_raise_fails_there_and_nowhere_else(tmp_path: Path) -> None:
    arm(tmp_path, "raise\n")
    install(str(tmp_path), SystemClock())
    reach(THERE)
    with pytest.raises(InternalError, match=r"d\.mid_pull was armed"):
        reach(HERE)
    with pytest.raises(InternalError):
        reach(HERE)
    assert (tmp_path / f"{HERE}.hit").read_text() == "2\n"
    (tmp_path / f"{HERE}.arm").unlink()
    reach(HERE)


def test_an_order_may_mean_one_time_alone_and_counts_anew_when_armed_anew(tmp_path: Path) -> None:
    arm(tmp_path, "raise*2")
    install(str(tmp_path), SystemClock())
    for _ in range(2):
        reach(HERE)
        assert not (tmp_path / f"{HERE}.hit").exists()
        with pytest.raises(InternalError):
            reach(HERE)
        reach(HERE)
        (tmp_path / f"{HERE}.hit").unlink()
        arm(tmp_path, "raise*2")


def test_a_running_process_may_be_armed(tmp_path: Path) -> None:
    install(str(tmp_path), SystemClock())
    reach(HERE)
    (tmp_path / f"{HERE}.arm").touch()
    reach(HERE)
    arm(tmp_path, "raise")
    with pytest.raises(InternalError):
        reach(HERE)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("d.mid_pul", "kill", r"d\.mid_pul\.arm arms no failpoint.*p\.submitted"),
        (HERE, "explode", r"d\.mid_pull is armed with 'explode'; write kill"),
        (HERE, "kill*0", r"kill\*0"),
        (HERE, "kill twice", "kill twice"),
    ],
)
def test_what_is_not_understood_is_refused_at_the_start(
    name: str, text: str, said: str, tmp_path: Path
) -> None:
    arm(tmp_path, text, name)
    with pytest.raises(ConfigError, match=said):
        install(str(tmp_path), SystemClock())
    assert failpoints._failpoints is None


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder of failpoints"):
        install(str(tmp_path / "nowhere"), SystemClock())


def test_an_unregistered_place_is_our_own_mistake(tmp_path: Path) -> None:
    install(str(tmp_path), SystemClock())
    with pytest.raises(AssertionError, match="not registered"):
        reach("d.nowhere")


def test_wait_holds_the_thread_until_it_is_released(tmp_path: Path) -> None:
    arm(tmp_path, "wait")
    install(str(tmp_path), SystemClock())
    passed = threading.Event()
    thread = threading.Thread(target=lambda: (reach(HERE), passed.set()))
    thread.start()
    wait_for_file(tmp_path / f"{HERE}.hit")
    assert not passed.is_set()
    (tmp_path / f"{HERE}.release").touch()
    assert passed.wait(WAIT_LIMIT_S)
    thread.join()


async def test_wait_on_the_event_loop_lets_the_loop_go_on(tmp_path: Path) -> None:
    arm(tmp_path, "wait")
    install(str(tmp_path), SystemClock())
    waiting = asyncio.create_task(reach_async(HERE))
    turns = 0
    async with asyncio.timeout(WAIT_LIMIT_S):
        while not (tmp_path / f"{HERE}.hit").exists() or turns < 10:
            turns += 1
            # One turn of the loop.
            await asyncio.wait([asyncio.create_task(reach_async(THERE))])
        assert not waiting.done()
        (tmp_path / f"{HERE}.release").touch()
        await waiting


def test_nobody_waits_for_ever(tmp_path: Path) -> None:
    """The clock is past the deadline when the place looks for its release the second time."""

    class Impatient(ManualClock):
        def monotonic(self) -> float:
            self.advance(40.0)
            return super().monotonic()

    arm(tmp_path, "wait")
    install(str(tmp_path), Impatient())
    with pytest.raises(InternalError, match="not released within 60 s"):
        reach(HERE)
    with pytest.raises(InternalError, match="not released within 60 s"):
        asyncio.run(reach_async(HERE))


def test_kill_ends_the_process_at_the_place(tmp_path: Path) -> None:
    arm(tmp_path, "kill*2")
    process = start(tmp_path)
    said, complained = process.communicate(timeout=WAIT_LIMIT_S)
    assert process.returncode == -signal.SIGKILL, complained
    assert said.split("\n")[:-1] == ["before 1", "after 1", "before 2"]
    assert (tmp_path / f"{HERE}.hit").exists()


def test_stop_freezes_the_process_at_the_place_until_it_is_continued(tmp_path: Path) -> None:
    arm(tmp_path, "stop*1")
    process = start(tmp_path)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert (tmp_path / f"{HERE}.hit").exists()
    os.kill(process.pid, signal.SIGCONT)
    said, complained = process.communicate(timeout=WAIT_LIMIT_S)
    assert process.returncode == 0, complained
    assert said.split("\n")[:-1] == [
        f"{when} {n}" for n in (1, 2, 3) for when in ("before", "after")
    ]


async def test_a_test_arms_a_callable_in_its_own_process() -> None:
    reached: list[str] = []
    with armed(HERE, lambda: reached.append(HERE)), armed(THERE, lambda: reached.append(THERE)):
        reach(HERE)
        reach(THERE)
        reach("p.submitted")
        await reach_async(HERE)
    reach(HERE)
    assert reached == [HERE, THERE, HERE]
    assert failpoints._failpoints is None


async def test_a_callable_may_hold_a_place_of_the_event_loop() -> None:
    release = asyncio.Event()
    with armed(HERE, release.wait):
        waiting = asyncio.create_task(reach_async(HERE))
        done, _ = await asyncio.wait([waiting], timeout=0.01)
        assert not done
        release.set()
        await waiting


def test_a_callable_that_raises_is_a_failure_at_the_place() -> None:
    def fail() -> None:
        raise MemoryError("no block is left")

    with armed(HERE, fail), pytest.raises(MemoryError):
        reach(HERE)
