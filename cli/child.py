"""A process that a supervisor started: it dies with us, and its output comes here line by line."""

import asyncio
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from baton.cli import leash

KEPT_LINES: Final = 20
MAX_LINE_BYTES: Final = 64 * 1024
# How a verb of ours begins the line that says why it ended.
ERROR_PREFIX: Final = "error: "
# A child that ended closes its end; somebody who inherited it does not keep us waiting.
OUTPUT_GRACE_S: Final = 1.0

_LEASH: Final = str(Path(leash.__file__).resolve())

LineSink = Callable[[str, str], None]
"""Called with the child's name and a line of its output."""


class Child:
    """Used on the event loop of the thread that started it, which must not end before."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, sink: LineSink) -> None:
        self.name = name
        self.last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._process = process
        self._sink = sink
        self._reading = asyncio.create_task(self._read(), name=f"output of {name}")

    @classmethod
    async def start(cls, name: str, program: Sequence[str], sink: LineSink) -> "Child":
        """Run `program`, an absolute path and its arguments.

        In a session of its own: a Ctrl-C at the terminal reaches the supervisor alone.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            _LEASH,
            str(os.getpid()),
            *program,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        return cls(name, process, sink)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None

    async def wait(self) -> int:
        """The exit code once it ended, negative for a signal; its output was read by then."""
        code = await self._process.wait()
        await asyncio.wait([self._reading], timeout=OUTPUT_GRACE_S)
        return code

    async def stop(self, deadline_s: float) -> bool:
        """SIGTERM, then SIGKILL at the deadline; whether it ended in time."""
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(deadline_s):
                await self._process.wait()
            in_time = True
        except TimeoutError:
            in_time = False
            await self.kill()
        await self.wait()
        return in_time

    async def kill(self) -> None:
        self._signal(signal.SIGKILL)
        await self.wait()

    def how_it_ended(self) -> str:
        """ "exit code 1" or "SIGKILL", with the error that it named itself.

        Who was killed by a signal said nothing of it: its last lines are about something else.
        """
        code = self._process.returncode
        assert code is not None, "it still runs"
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        if code < 0:
            return how
        named = [line for line in self.last_lines if line.startswith(ERROR_PREFIX)]
        said = (
            named[-1].removeprefix(ERROR_PREFIX)
            if named
            else " | ".join(list(self.last_lines)[-3:])
        )
        return f"{how}: {said}" if said else how

    def _signal(self, number: signal.Signals) -> None:
        if self.is_alive:
            self._process.send_signal(number)

    async def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None, "the output was asked for as a pipe"
        rest = b""
        while data := await stream.read(MAX_LINE_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > MAX_LINE_BYTES:
                lines.append(rest)
                rest = b""
            for line in lines:
                self._take(line)
        if rest:
            self._take(rest)

    def _take(self, raw: bytes) -> None:
        line = raw.decode(errors="replace").rstrip()
        if line:
            self.last_lines.append(line)
            self._sink(self.name, line)
