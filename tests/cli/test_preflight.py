"""What `baton up` refuses before it starts a process."""

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.cli.main import run
from baton.cli.preflight import check_ports
from baton.common.config import RouterConfig
from baton.common.errors import ConfigError


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("name", ["http_port", "grpc_port", "admin_port"])
def test_a_taken_port_is_named_by_its_flag(name: str, taken_port: int) -> None:
    ports = {"http_port": 0, "grpc_port": 0, "admin_port": 0, name: taken_port}
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} {taken_port} is taken"):
        check_ports(RouterConfig(**ports))


def test_one_port_twice(taken_port: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    with pytest.raises(ConfigError, match="--grpc-port and --http-port are both"):
        check_ports(RouterConfig(http_port=free, grpc_port=free, admin_port=taken_port))


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    ports = ["--http-port", "0", "--grpc-port", "0", "--admin-port", "0"]
    assert run(["up", *arguments, *ports]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1, shown.err
    return shown.err


@pytest.mark.parametrize("broken", [None, "{"])
def test_a_tokenizer_that_cannot_be_read(
    broken: str | None, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the router needs it, and the cluster would wait for it until the start's deadline."""
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    if broken is not None:
        (folder / "tokenizer.json").write_text(broken)
    assert str(folder / "tokenizer.json") in refused([str(folder)], capsys)


def test_no_workers_at_all(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for counts in (["--prefill", "-1"], ["--decode", "0"], ["--unified", "-1"]):
        told = refused([str(tiny_llama), *counts], capsys)
        assert " ".join(counts) in told
        assert "is no cluster that serves" in told
