"""The TCP connections of other processes: who is connected to whom, and RST between them."""

import os
import re
import subprocess
from pathlib import Path

_ESTABLISHED = "01"


def ports(pid: int) -> set[tuple[int, int]]:
    """(local port, remote port) of each established connection that a process has open."""
    proc = Path(f"/proc/{pid}")
    open_inodes = set()
    for entry in os.listdir(proc / "fd"):
        try:
            found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(proc / "fd" / entry))
        except FileNotFoundError:
            # Closed meanwhile.
            continue
        if found is not None:
            open_inodes.add(found[1])
    connected = set()
    for table in ("tcp", "tcp6"):
        for row in (proc / "net" / table).read_text().splitlines()[1:]:
            _, local, remote, state, *_, inode = row.split()[:10]
            if inode in open_inodes and state == _ESTABLISHED:
                connected.add((_port(local), _port(remote)))
    return connected


def between(one: int, other: int) -> set[tuple[int, int]]:
    """The connections of two processes with each other, as `one` sees them."""
    mirrored = {(local, remote) for remote, local in ports(other)}
    return ports(one) & mirrored


def reset(connections: set[tuple[int, int]]) -> bool:
    """RST to both ends of each; False where this needs more rights, or another kernel."""
    for local, remote in connections:
        told = ["ss", "--kill", "sport", "=", f":{local}", "dport", "=", f":{remote}"]
        subprocess.run(told, check=True, capture_output=True)
    return not connections & _all_established()


def _all_established() -> set[tuple[int, int]]:
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, remote, state = row.split()[:4]
            if state == _ESTABLISHED:
                found.add((_port(local), _port(remote)))
    return found


def _port(address: str) -> int:
    return int(address.rpartition(":")[2], 16)
