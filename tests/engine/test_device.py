"""The contract of devices, over all three; and what is particular to each."""

import threading
from collections.abc import Callable, Iterator

import pytest

from baton.common.errors import InternalError
from baton.common.randomness import SeededRandomness
from baton.engine.device import (
    MAX_QUEUED,
    Device,
    InlineDevice,
    ManualDevice,
    ThreadDevice,
    Ticket,
)

DEADLINE_S = 20.0


def make(kind: str) -> Device:
    if kind == "inline":
        return InlineDevice()
    if kind == "manual":
        return ManualDevice()
    return ThreadDevice(SeededRandomness(1), 0.002)


@pytest.fixture(params=["inline", "thread", "manual"])
def device(request) -> Iterator[Device]:
    made = make(request.param)
    yield made
    made.close()


def settle(device: Device, ticket: Ticket) -> None:
    """Let the device do its work up to the ticket's."""
    if isinstance(device, ManualDevice):
        device.run_all()
    ticket.wait(DEADLINE_S)


def test_a_work_ends_with_what_it_returned(device):
    ticket = device.submit(lambda: 6 * 7)
    settle(device, ticket)
    assert ticket.poll()
    assert ticket.result() == ticket.result() == 42
    ticket.wait(0.0)


def test_works_run_in_the_order_of_submission(device):
    seen = []
    tickets = [device.submit(lambda number=number: seen.append(number)) for number in range(20)]
    settle(device, tickets[-1])
    assert seen == list(range(20))
    assert all(ticket.poll() for ticket in tickets)


def test_an_error_waits_in_the_ticket_and_ends_nothing_else(device):
    def fail() -> int:
        raise KeyError("a")

    broken, after = device.submit(fail), device.submit(lambda: 1)
    settle(device, after)
    assert broken.poll()
    for _ in range(2):
        with pytest.raises(KeyError):
            broken.result()
    assert after.result() == 1


def test_a_closed_device_takes_no_work(device):
    device.close()
    device.close()
    with pytest.raises(AssertionError, match="closed device"):
        device.submit(lambda: 1)


@pytest.mark.parametrize("kind", ["thread", "manual"])
def test_a_result_before_the_end_is_a_bug_and_a_wait_has_a_deadline(kind):
    device, gate = make(kind), threading.Event()
    ticket = device.submit(lambda: gate.wait(DEADLINE_S))
    assert not ticket.poll()
    with pytest.raises(AssertionError, match="has not ended"):
        ticket.result()
    with pytest.raises(InternalError):
        ticket.wait(0.01)
    gate.set()
    settle(device, ticket)
    assert ticket.result() is True
    device.close()


@pytest.mark.parametrize("kind", ["thread", "manual"])
def test_the_queue_is_bounded(kind):
    device, gate = make(kind), threading.Event()
    begun = threading.Event()

    def hold() -> None:
        begun.set()
        gate.wait(DEADLINE_S)

    device.submit(hold)
    if isinstance(device, ThreadDevice):
        assert begun.wait(DEADLINE_S)
        device.submit(lambda: None)
    for _ in range(MAX_QUEUED - 1):
        device.submit(lambda: None)
    with pytest.raises(AssertionError, match="outstanding"):
        device.submit(lambda: None)
    gate.set()
    device.close()


def test_closing_waits_for_the_running_work_and_begins_no_other():
    device = ThreadDevice(SeededRandomness(1), 0.0)
    begun, gate, seen = threading.Event(), threading.Event(), []

    def hold() -> None:
        begun.set()
        gate.wait(DEADLINE_S)
        seen.append("first")

    first, second = device.submit(hold), device.submit(lambda: seen.append("second"))
    assert begun.wait(DEADLINE_S)
    closer = threading.Thread(target=device.close)
    closer.start()
    gate.set()
    closer.join(DEADLINE_S)
    assert not closer.is_alive()
    assert first.poll()
    # The second may have begun before the close was seen, never after close returned.
    assert seen in (["first"], ["first", "second"])
    assert second.poll() == (len(seen) == 2)


def test_a_manual_device_runs_one_work_at_a_time():
    device, seen = ManualDevice(), []
    for number in range(3):
        device.submit(lambda number=number: seen.append(number))
    assert (device.num_queued, seen) == (3, [])
    assert device.run_next()
    assert seen == [0]
    assert device.run_all() == 2
    assert not device.run_next()


def test_thread_works_run_elsewhere_and_drop_what_they_held():
    device = ThreadDevice(SeededRandomness(1), 0.0)
    names: list[str] = []

    def work() -> Callable[[], str]:
        name = threading.current_thread().name
        names.append(name)
        return lambda: name

    ticket = device.submit(work)
    ticket.wait(DEADLINE_S)
    assert ticket.result()() == "device" != threading.current_thread().name
    device.close()
