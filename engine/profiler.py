"""torch.profiler around the next steps of an engine, one profile at a time.

    start(n) ... step ... step n ends, or stop() ... Recording.write(): a Chrome trace

The first start of a process takes a second, since the profiler is loaded then. Stopping pauses the
engine for as long as it takes to sort what was recorded, and writing holds the interpreter,
whichever thread does it: milliseconds for 20 steps of a host, a second or two for 200 of a GPU. The
bound keeps that well below the time after which a worker that says nothing counts as dead.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch.profiler import ProfilerActivity, profile

from baton.common.errors import AlreadyExists, InvalidRequest
from baton.engine.step_recorder import StepRecorder

log = logging.getLogger(__name__)

MAX_PROFILED_STEPS: Final = 200


@dataclass(frozen=True, slots=True)
class Recording:
    """A profile that has ended and is not written yet."""

    path: Path
    num_steps: int
    _profile: profile

    def write(self) -> None:
        """Whole or not at all: whoever sees the file may read it. Raises OSError."""
        scratch = self.path.with_suffix(".part")
        self._profile.export_chrome_trace(str(scratch))
        # The profiler does not tell when it could not write; then this does not find the file.
        os.replace(scratch, self.path)


@dataclass(frozen=True, slots=True)
class _Running:
    profile: profile
    path: Path
    # The numbers of the steps before the first, and of the last.
    after: int
    last: int


class StepProfiler:
    """Engine thread only. `ended` is called there with what is to be written elsewhere.

    It records what this thread does, and with `on_gpu` what the GPU does.
    """

    def __init__(
        self, recorder: StepRecorder, ended: Callable[[Recording], None], *, on_gpu: bool
    ) -> None:
        self._recorder = recorder
        self._ended = ended
        self._activities = [ProfilerActivity.CPU]
        if on_gpu and torch.cuda.is_available():
            self._activities.append(ProfilerActivity.CUDA)
        self._running: _Running | None = None
        self._last_path: Path | None = None

    def start(self, num_steps: int, path: Path) -> None:
        """Profile the steps launched from now on. AlreadyExists while a profile runs."""
        assert 0 < num_steps <= MAX_PROFILED_STEPS, "checked where it was asked for"
        if self._running is not None:
            raise AlreadyExists(
                f"a profile already runs, of {self._num_left} more steps; wait for it, or end it "
                "with `baton admin profile stop`"
            )
        started = profile(activities=self._activities)
        started.start()
        before = self._recorder.num_launched
        self._running = _Running(started, path, before, before + num_steps)

    def stop(self) -> Path:
        """End the profile that runs; where its trace is going to be. InvalidRequest: none does."""
        running = self._running
        if running is None:
            found = "" if self._last_path is None else f", and the last one is {self._last_path}"
            raise InvalidRequest(f"no profile runs{found}; `baton admin profile start` begins one")
        self._running = None
        self._last_path = running.path
        running.profile.stop()
        num_steps = max(0, self._recorder.last_ended - running.after)
        self._ended(Recording(running.path, num_steps, running.profile))
        return running.path

    def look(self) -> None:
        """To be called after each round of the engine: ends a profile that has all its steps.

        A profile that fails costs itself alone.
        """
        if self._running is not None and self._num_left <= 0:
            self.close()

    def close(self) -> None:
        """End the profile that runs, if one does."""
        if self._running is None:
            return
        try:
            self.stop()
        except Exception:
            log.exception("a profile was lost")

    @property
    def _num_left(self) -> int:
        assert self._running is not None, "a profile runs"
        return self._running.last - self._recorder.last_ended
