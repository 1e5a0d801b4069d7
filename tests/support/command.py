"""The `baton` command as a process, the way a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

BATON = [sys.executable, "-P", "-m", "baton.cli"]


def environment(**more: str) -> dict[str, str]:
    """This process's, without what would configure Baton."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    return {**kept, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200", **more}


def baton(
    *arguments: str, stdin: str = "", cwd: Path | None = None, timeout_s: float = 60, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run it to its end; `more` goes into its environment."""
    return subprocess.run(
        [*BATON, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=cwd,
        env=environment(**more),
        check=False,
    )
