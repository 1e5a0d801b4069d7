"""Runs a program that cannot outlive its parent: `python -I -S leash.py PARENT_PID PROGRAM ARG…`.

PR_SET_PDEATHSIG has the kernel kill this process when the parent's thread that started it ends, be
it by `kill -9`; exec keeps the setting. A small program of its own, because the alternative, Python
code between fork and exec of the parent, may deadlock as soon as the parent has threads.
"""

import ctypes
import os
import signal
import sys
from typing import Final

PR_SET_PDEATHSIG: Final = 1
EXIT_NOT_STARTED: Final = 126


def main(arguments: list[str]) -> None:
    parent, program = int(arguments[0]), arguments[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"error: prctl(PR_SET_PDEATHSIG) failed with errno {ctypes.get_errno()}")
    # A parent that died before the call above sends nothing any more.
    if os.getppid() != parent:
        sys.exit(EXIT_NOT_STARTED)
    try:
        os.execv(program[0], program)
    except OSError as error:
        sys.exit(f"error: cannot run {program[0]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
