"""Log lines: one per record, readable by people and by `key=value` parsers."""

import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest

from baton.common.errors import ConfigError
from baton.common.log import LineFormatter, set_up_logging


@pytest.fixture
def kept_logging() -> Iterator[None]:
    """Gives the process its own loggers back."""
    root, ours = logging.getLogger(), logging.getLogger("baton")
    before = (root.handlers[:], root.level, ours.level)
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("baton.router.server", logging.INFO, "f", 1, message, (), None)
    made.created = 1_800_000_000.125
    made.__dict__.update(extra)
    return made


def test_a_line() -> None:
    line = LineFormatter("router").format(record("ready", request_id="r 1", attempt=2))
    assert line == (
        "ts=2027-01-15T08:00:00.125Z level=INFO part=router at=router.server msg=ready "
        'request_id="r 1" attempt=2'
    )


@pytest.mark.parametrize(
    "message", ["two\nlines", 'a "quote"', "", "a=b", "back\\slash", "\x1b[2J"]
)
def test_a_message_stays_on_its_line(message: str) -> None:
    line = LineFormatter("p0").format(record(message))
    assert line.isprintable()
    assert json.loads(line.partition(" msg=")[2]) == message


def test_a_traceback_follows_indented() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        made = record("failed")
        made.exc_info = sys.exc_info()
    first, *rest = LineFormatter("p0").format(made).splitlines()
    assert first.endswith("msg=failed")
    assert rest[-1] == "    ValueError: broken"
    assert all(row.startswith("    ") for row in rest)


@pytest.mark.usefixtures("kept_logging")
def test_levels() -> None:
    stream = io.StringIO()
    set_up_logging("debug", "p0", stream)
    logging.getLogger("baton.worker").debug("ours")
    logging.getLogger("grpc").info("theirs")
    logging.getLogger("grpc").warning("trouble")
    messages = [line.rpartition("msg=")[2] for line in stream.getvalue().splitlines()]
    assert messages == ["ours", "trouble"]
    with pytest.raises(ConfigError, match="loud"):
        set_up_logging("loud", "p0")


@pytest.mark.usefixtures("kept_logging")
def test_memory_that_grpc_takes_for_text_is_not_logged() -> None:
    stream = io.StringIO()
    set_up_logging("INFO", "d0", stream)
    library = logging.getLogger("grpc._cython.cygrpc")
    # As seen when a process has no file descriptor left.
    library.error("Invalid encoding on %s", b"Too many open files\n\x00\x90prompt")
    library.error("a servicer failed")
    assert [line.rpartition("msg=")[2] for line in stream.getvalue().splitlines()] == [
        '"a servicer failed"'
    ]


@pytest.mark.usefixtures("kept_logging")
def test_a_peer_that_hangs_up_during_a_write_is_no_traceback() -> None:
    class ExecuteBatchError(Exception):
        pass

    stream = io.StringIO()
    set_up_logging("INFO", "d0", stream)
    library = logging.getLogger("grpc._cython.cygrpc")
    for error in (ExecuteBatchError("closed"), ValueError("a bug")):
        library.error("a stream failed", exc_info=error)
    assert stream.getvalue().count("a stream failed") == 1
    assert "ValueError: a bug" in stream.getvalue()
