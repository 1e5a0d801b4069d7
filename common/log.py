"""Logging: one line per record, made of `key=value` pairs, on stderr.

    ts=2026-08-01T12:00:00.123Z level=INFO part=prefill-0 at=worker.server msg="prefill-0 serves"

`request_id` and `attempt` follow when a record has them (`extra=`). The traceback of an exception
comes after its line, each of its lines indented.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Final, TextIO

from baton.common.errors import ConfigError

LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR")
_EXTRAS: Final = ("request_id", "attempt")


class LineFormatter(logging.Formatter):
    """`part` names the process: router, or the id of a worker."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self._part = part

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        pairs = {
            "ts": moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z",
            "level": record.levelname,
            "part": self._part,
            "at": record.name.removeprefix("baton."),
            "msg": record.getMessage(),
        }
        pairs |= {name: str(getattr(record, name)) for name in _EXTRAS if hasattr(record, name)}
        line = " ".join(f"{name}={_quoted(value)}" for name, value in pairs.items())
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            line += "".join(f"\n    {row}" for row in trace.splitlines())
        return line


def check_level(level: str) -> str:
    """The level in capitals. Raises ConfigError when there is none of that name."""
    name = level.upper()
    if name not in LEVELS:
        raise ConfigError(f"log level {level!r} is unknown; use one of {', '.join(LEVELS)}")
    return name


def is_no_stray_memory(record: logging.LogRecord) -> bool:
    """False for gRPC's complaint that the text of an error is no UTF-8, with that text.

    Without free file descriptors it ends in whatever memory held before, prompts not excluded.
    """
    return not (record.name.startswith("grpc.") and str(record.msg).startswith("Invalid encoding"))


def set_up_logging(level: str, part: str, stream: TextIO | None = None) -> None:
    """Send the records of this process to `stream` (stderr); raises ConfigError for the level.

    Libraries speak up at WARNING only: grpc alone would write a line per call.
    """
    name = check_level(level)
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(LineFormatter(part))
    handler.addFilter(_is_news)
    handler.addFilter(is_no_stray_memory)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(name if name == "ERROR" else "WARNING")
    logging.getLogger("baton").setLevel(name)


def _is_news(record: logging.LogRecord) -> bool:
    """gRPC logs a traceback for each peer that hangs up during a write: what it means is logged
    where the stream ends."""
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or kind.__name__ != "ExecuteBatchError"


def _quoted(value: str) -> str:
    """Bare when that is unambiguous, else as a JSON string, which is always one line."""
    is_bare = bool(value) and value.isprintable() and not any(c in ' "=\\' for c in value)
    return value if is_bare else json.dumps(value, ensure_ascii=False)
