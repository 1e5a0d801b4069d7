"""`baton admin steps` and `baton admin profile` on a real cluster."""

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from support.cluster import Cluster, run_cluster, until
from support.command import baton

from baton.client.admin import AdminClient
from baton.common.errors import AlreadyExists, ConfigError, InvalidRequest
from baton.common.failpoints import armed

PROMPT = [5 + index % 300 for index in range(70)]


def at(cluster: Cluster) -> str:
    return f"127.0.0.1:{cluster.router.admin_port}"


async def admin(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, while this process goes on serving."""
    return await asyncio.to_thread(baton, "admin", *arguments, "--admin", at(cluster))


async def told(cluster: Cluster, *arguments: str) -> Any:
    """What the command answers as JSON; it must succeed."""
    done = await admin(cluster, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@asynccontextmanager
async def served(
    model: Path, redis_url: str, **flags: Any
) -> AsyncIterator[tuple[Cluster, AdminClient]]:
    async with (
        run_cluster(model, redis_url, **flags) as cluster,
        AdminClient(at(cluster)) as client,
    ):
        yield cluster, client


def operators(path: Path) -> set[str]:
    """The torch operators that a trace names; it must be JSON."""
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return {event["name"] for event in events if event.get("name", "").startswith("aten::")}


async def test_the_steps_of_a_request_are_shown(tiny_llama: Path, redis_url: str) -> None:
    async with served(tiny_llama, redis_url) as (cluster, client):
        idle = await admin(cluster, "steps", "d0")
        assert idle.returncode == 0, idle.stderr
        assert f"{cluster.decodes[0].identity} has made no step yet" in idle.stderr

        await cluster.generate(PROMPT, max_tokens=9)
        prefill = await told(cluster, "steps", "p0")
        assert prefill["worker"] == str(cluster.prefills[0].identity)
        [only] = prefill["steps"]
        assert (only["number"], only["rows"], only["replayed"]) == (1, 1, None)
        assert (only["tokens"], only["prompt_tokens"]) == (70, 70)
        assert only["age_s"] >= only["took_s"] > 0
        assert prefill["summary"]["max_s"] == only["took_s"]

        # The first of nine tokens is of the prefill worker.
        decode = await told(cluster, "steps", "d0", "--last", "5")
        assert [one["number"] for one in decode["steps"]] == [4, 5, 6, 7, 8]
        assert {(one["tokens"], one["prompt_tokens"]) for one in decode["steps"]} == {(1, 0)}
        summary = decode["summary"]
        assert (summary["steps"], summary["tokens"], summary["prompt_tokens"]) == (5, 5, 0)
        assert summary["busy_s"] <= summary["window_s"]
        assert summary["tokens_per_s"] == 5 / summary["window_s"]

        table = await admin(cluster, "steps", "d0")
        header, *rows = table.stdout.splitlines()
        assert header.split() == ["step", "launched", "took", "rows", "tokens", "prompt", "by"]
        assert [row.split()[0] for row in rows] == [str(number) for number in range(1, 9)]
        assert {row.split()[-1] for row in rows} == {"host"}
        assert "8 steps in" in table.stderr
        with pytest.raises(InvalidRequest, match="last is a number from 1 on, not 0"):
            await client.steps("d0", 0)


async def test_steps_are_told_while_the_engine_is_stuck(tiny_llama: Path, redis_url: str) -> None:
    entered, release = Event(), Event()

    def stuck() -> None:
        entered.set()
        assert release.wait(60)

    async with served(tiny_llama, redis_url) as (cluster, client):
        with armed("d.after_emit", stuck):
            asking = asyncio.create_task(cluster.generate(PROMPT, max_tokens=9))
            try:
                await until(entered.is_set, "no step ended")
                assert len((await client.steps("d0")).steps) == 1
            finally:
                release.set()
        await asking


async def test_a_profile_of_some_steps_ends_by_itself_in_a_trace(
    tiny_llama: Path, redis_url: str, tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "traces"
    async with served(tiny_llama, redis_url, profile_dir=str(folder)) as (cluster, client):
        started = await admin(cluster, "profile", "start", "d0", "--steps", "3")
        assert started.returncode == 0, started.stderr
        life = cluster.decodes[0].identity
        path = folder / f"d0-{life.epoch}-1.json"
        assert started.stdout == (f"{life} profiles its next 3 steps; the trace will be {path}\n")
        again = await admin(cluster, "profile", "start", "d0")
        assert (again.returncode, again.stdout) == (1, "")
        assert "a profile already runs, of 3 more steps" in again.stderr
        with pytest.raises(AlreadyExists):
            await client.start_profile("d0")
        await cluster.generate(PROMPT, max_tokens=9)
        await until(path.exists, "no trace was written")
        assert "aten::mm" in operators(path) or "aten::linear" in operators(path)
        assert list(folder.iterdir()) == [path]

        over = await admin(cluster, "profile", "stop", "d0")
        assert (over.returncode, over.stdout) == (1, "")
        assert f"no profile runs, and the last one is {path}" in over.stderr


async def test_a_profile_is_stopped_and_its_trace_goes_where_temporary_files_go(
    tiny_llama: Path, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    async with served(tiny_llama, redis_url) as (cluster, client):
        started = await client.start_profile("p0", 200)
        path = Path(started.path)
        assert path.parent.parent == tmp_path
        assert not started.is_written
        await cluster.generate(PROMPT, max_tokens=2)
        stopped = await told(cluster, "profile", "stop", "p0")
        assert (stopped["worker"], stopped["path"]) == (started.worker, started.path)
        await until(path.exists, "no trace was written")
        assert operators(path)
        # Another one follows into the same folder.
        second = await client.start_profile("p0")
        assert Path(second.path).parent == path.parent
        assert second.path != started.path
        shown = await admin(cluster, "profile", "stop", "p0")
        # A machine that is busy may still be at it.
        assert shown.stdout in {
            f"{second.worker} {verb} {second.path}\n" for verb in ("wrote", "is writing")
        }


async def test_what_is_wrong_with_a_profile_is_said(
    tiny_llama: Path, redis_url: str, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file")
    flags = {"profile_dir": str(tmp_path / "taken" / "traces")}
    async with served(tiny_llama, redis_url, **flags) as (cluster, client):
        for verb in (("steps",), ("profile", "start"), ("profile", "stop")):
            failed = await admin(cluster, *verb, "nobody")
            assert (failed.returncode, failed.stdout) == (4, "")
            assert "knows no worker 'nobody'; it knows d0, p0" in failed.stderr
        none = await admin(cluster, "profile", "stop", "d0")
        assert none.returncode == 1
        assert "no profile runs; `baton admin profile start` begins one" in none.stderr
        with pytest.raises(ConfigError, match=r"cannot write a trace to .*traces.*--profile-dir"):
            await client.start_profile("d0")
        with pytest.raises(InvalidRequest, match="1 to 200 steps, not of 201"):
            await client.start_profile("d0", 201)
        beyond = await admin(cluster, "profile", "start", "d0", "--steps", "201")
        assert beyond.returncode == 2
        assert (await admin(cluster, "profile", "stop", "d0")).returncode == 1, "none was begun"


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        (("steps",), ("ID", "--last", "--admin", "--json")),
        (("profile", "start"), ("ID", "--steps", "--admin", "--json")),
        (("profile", "stop"), ("ID", "--admin", "--json")),
    ],
    ids=lambda words: " ".join(words),
)
def test_each_verb_explains_itself(verb: tuple[str, ...], flags: tuple[str, ...]) -> None:
    shown = baton("admin", *verb, "--help")
    assert shown.returncode == 0, shown.stderr
    assert [flag for flag in flags if f"{flag} " not in shown.stdout] == []
