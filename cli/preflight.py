"""What `baton up` finds out before it starts a process: an answer at once instead of a log line."""

import errno
import socket
from pathlib import Path
from typing import Final

from baton.common.clock import SystemClock
from baton.common.config import RouterConfig
from baton.common.errors import ConfigError

_PORTS: Final = ("http_port", "grpc_port", "admin_port")


def check_ports(config: RouterConfig) -> None:
    """Raises ConfigError for a port that is asked for twice, or is taken.

    Somebody may still take one before the router does; it looks again. Other trouble with the
    address, such as a host that is not ours, is the router's to name.
    """
    asked: dict[int, str] = {}
    for name in _PORTS:
        port = getattr(config, name)
        flag = f"--{name.replace('_', '-')}"
        if port == 0:
            continue
        if port in asked:
            raise ConfigError(f"{flag} and {asked[port]} are both {port}; choose another for one")
        asked[port] = flag
        if _is_taken(config.host, port):
            raise ConfigError(
                f"{flag} {port} is taken on {config.host}, perhaps by another cluster; choose "
                "another, or 0 for any free one"
            )


def check_words(folder: Path) -> None:
    """Raises ModelError when the folder's tokenizer, template or defaults cannot be read."""
    from baton.router.served_model import load_served_model

    load_served_model(folder.name, folder, max_model_len=1, vocab_size=1, clock=SystemClock())


def _is_taken(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: a connection that lingers from the last run takes no port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False
