"""`baton up`: a real cluster of processes, and that none of them outlives it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.command import BATON, baton, environment
from support.house import ROOT

READY_DEADLINE_S = 60.0
STOP_DEADLINE_S = 30.0


def wait_until(holds: Callable[[], bool], what: str, deadline_s: float) -> None:
    deadline = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < deadline, what
        # Processes tell nobody when they change: looking again is all there is.
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Zombies, which wait for a parent to ask about them, have ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


class Up:
    """A running `baton up` on free ports."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._ready_file = folder / "ready.json"
        self._stderr = (folder / "stderr").open("w+")
        self.process = subprocess.Popen(
            [
                *BATON,
                "up",
                *arguments,
                *("--http-port", "0", "--grpc-port", "0", "--admin-port", "0"),
                *("--ready-file", str(self._ready_file)),
            ],
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=environment(TMPDIR=str(folder), XDG_CACHE_HOME=str(folder / "cache")),
        )
        self.all_pids: list[int] = []

    def wait_until_ready(self) -> dict[str, Any]:
        def is_ready() -> bool:
            assert self.process.poll() is None, self.stderr()
            return self._ready_file.exists()

        wait_until(is_ready, f"not ready: {self.stderr()}", READY_DEADLINE_S)
        self.all_pids = children(self.process.pid)
        found: dict[str, Any] = json.loads(self._ready_file.read_text())
        return found

    def stderr(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read()

    def wait(self) -> int:
        return self.process.wait(STOP_DEADLINE_S)

    def expect_nothing_left(self) -> None:
        assert self.all_pids, "it was ready once"
        wait_until(
            lambda: not any(map(is_running, self.all_pids)), "processes are left", STOP_DEADLINE_S
        )

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self._stderr.close()


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def start(*arguments: str) -> Up:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(Up(folder, *arguments))
        return started[-1]

    yield start
    for one in started:
        one.close()


def complete(at: dict[str, Any], prompt: str, *arguments: str) -> dict[str, Any]:
    greedy = ["--temperature", "0", "--ignore-eos", "--max-tokens", "8"]
    shown = baton("complete", prompt, "--router", at["grpc"], *greedy, *arguments, "--json")
    assert shown.returncode == 0, shown.stderr
    found: dict[str, Any] = json.loads(shown.stdout)
    return found


def run_the_snippet_of_the_readme(at: dict[str, Any]) -> str:
    """As it stands there, but for the port; what it printed."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [program] = re.findall(r"```python\n(from openai .*?)```", readme, re.DOTALL)
    assert "http://127.0.0.1:8000" in program
    program = program.replace("http://127.0.0.1:8000", at["http"])
    ran = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "completion_tokens=" in ran.stdout
    return ran.stdout


def say_the_lines_of_the_readme(at: dict[str, Any]) -> list[str]:
    """The answers to the conversation of the tour."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [lines] = re.findall(
        r"^    baton chat <<'END'\n(.*?)^    END$", readme, re.DOTALL | re.MULTILINE
    )
    talk = baton("chat", "--router", at["grpc"], stdin=textwrap.dedent(lines))
    assert talk.returncode == 0, talk.stderr
    return talk.stdout.splitlines()


def test_a_cluster_serves_and_stops_when_asked(up: Callable[..., Up], tiny_llama: Path) -> None:
    cluster = up(str(tiny_llama), "--num-blocks", "64", "--served-model-name", "tiny")
    at = cluster.wait_until_ready()
    assert len(cluster.all_pids) == 4

    answer = complete(at, "Once upon a time " * 8)
    assert len(answer["token_ids"]) == 8
    assert (answer["finish_reason"], answer["mode"]) == ("length", "disagg")
    assert answer["prefill_worker"].startswith("prefill-0")
    assert answer["decode_worker"].startswith("decode-0")
    assert answer["transport"] == "nixl"
    assert answer["prompt_tokens"] > 32
    assert answer["cached_tokens"] == 0
    # K and V, 2 layers, 2 heads of 16 elements of 4 bytes, blocks of 32 tokens.
    assert answer["kv_bytes"] == answer["kv_blocks"] * 32 * 2 * 2 * 2 * 16 * 4
    assert answer["ttft_s"] > 0
    assert answer["tpot_s"] > 0
    again = complete(at, "Once upon a time " * 8)
    assert again["token_ids"] == answer["token_ids"]
    assert again["cached_tokens"] >= 32

    shown = baton("admin", "workers", "list", "--admin", at["admin"], "--json")
    workers = {worker["id"]: worker for worker in json.loads(shown.stdout)}
    assert workers.keys() == {"prefill-0", "decode-0"}
    for worker in workers.values():
        assert worker["state"] == "ready"
        assert worker["role"] == worker["id"].partition("-")[0]
        assert worker["pid"] in cluster.all_pids
        assert worker["epoch"] > 0
        assert (worker["blocks_total"], worker["model"]) == (64, "tiny")
        assert 0 < worker["blocks_free"] <= 64
        assert worker["address"].startswith("127.0.0.1:")
    shown = baton("admin", "leases", "--admin", at["admin"], "--json")
    assert json.loads(shown.stdout) == []

    streamed = baton("complete", "Hi", "--router", at["grpc"], "--max-tokens", "4", "--seed", "1")
    assert streamed.returncode == 0
    assert "prefill-0" in streamed.stderr
    assert "nixl" in streamed.stderr
    short = baton("complete", "Hi", "--router", at["grpc"], "--max-tokens", "1")
    assert "→" not in short.stderr
    assert "nothing crossed" in short.stderr
    talk = baton("chat", "--router", at["grpc"], "--max-tokens", "4", stdin="hello\nagain\n")
    assert talk.returncode == 0, talk.stderr

    cluster.process.send_signal(signal.SIGTERM)
    assert cluster.wait() == 0, cluster.stderr()
    cluster.expect_nothing_left()
    assert "Traceback" not in cluster.stderr()
    assert cluster.process.stdout is not None
    table = cluster.process.stdout.read()
    assert at["http"] in table
    assert f"--router {at['grpc']}" in table


def test_without_a_model_the_shipped_one_answers_as_the_readme_says(
    up: Callable[..., Up],
) -> None:
    cluster = up()
    at = cluster.wait_until_ready()
    assert "serving baton-tiny" in cluster.stderr()
    assert {worker["model"] for worker in at["workers"]} == {"baton-tiny"}
    assert run_the_snippet_of_the_readme(at).startswith("4821 ")
    assert say_the_lines_of_the_readme(at)[1:] == ["4821", "7093", "682", "anchor, river, walnut"]


def test_kill_9_leaves_nothing_behind(up: Callable[..., Up], tiny_llama: Path) -> None:
    cluster = up(str(tiny_llama), "--num-blocks", "64")
    cluster.wait_until_ready()
    cluster.process.kill()
    cluster.process.wait()
    cluster.expect_nothing_left()


def test_the_others_go_on_until_a_role_is_lost(up: Callable[..., Up], tiny_llama: Path) -> None:
    cluster = up(str(tiny_llama), "--num-blocks", "64", "--prefill", "2")
    at = cluster.wait_until_ready()
    assert len(cluster.all_pids) == 5
    pids = {worker["id"]: worker["pid"] for worker in at["workers"]}
    os.kill(pids["prefill-1"], signal.SIGKILL)
    wait_until(lambda: "prefill-1 (pid" in cluster.stderr(), "the death is not told", 10)
    assert "the others go on" in cluster.stderr()
    os.kill(pids["prefill-0"], signal.SIGKILL)
    assert cluster.wait() == 1
    assert "error: prefill-0 (pid" in cluster.stderr()
    assert "SIGKILL" in cluster.stderr()
    cluster.expect_nothing_left()


def test_unified_workers_serve_until_the_last_is_lost(
    up: Callable[..., Up], tiny_llama: Path
) -> None:
    cluster = up(str(tiny_llama), "--num-blocks", "64", "--unified", "2")
    at = cluster.wait_until_ready()
    assert len(cluster.all_pids) == 4
    pids = {worker["id"]: worker["pid"] for worker in at["workers"]}
    assert pids.keys() == {"unified-0", "unified-1"}
    os.kill(pids["unified-1"], signal.SIGKILL)
    wait_until(lambda: "unified-1 (pid" in cluster.stderr(), "the death is not told", 10)
    assert "the others go on" in cluster.stderr()
    answer = complete(at, "Once upon a time")
    assert (answer["mode"], answer["decode_worker"].partition("@")[0]) == ("local", "unified-0")
    os.kill(pids["unified-0"], signal.SIGKILL)
    assert cluster.wait() == 1
    assert "error: unified-0 (pid" in cluster.stderr()
    cluster.expect_nothing_left()


def test_a_child_that_cannot_start_is_named(
    up: Callable[..., Up], tiny_llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / "config.json").write_text("{}")
    cluster = up(str(folder))
    assert cluster.wait() == 1
    last = cluster.stderr().strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "ended while the cluster started, with exit code 1" in last
    assert "architectures" in last
    assert cluster.stderr().count("architectures") == 1, "told once, not once a process"


def test_a_stop_while_it_starts(up: Callable[..., Up], tiny_llama: Path) -> None:
    cluster = up(str(tiny_llama))
    wait_until(lambda: "starting" in cluster.stderr(), "nothing starts", READY_DEADLINE_S)
    cluster.all_pids = children(cluster.process.pid)
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.wait() == 0
    cluster.expect_nothing_left()
