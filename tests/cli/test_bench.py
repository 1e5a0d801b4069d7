"""`baton bench recall` against a real cluster, and what it says of answers that are wrong."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.cluster import run_cluster
from support.command import BATON, baton, environment
from support.house import ROOT
from support.ports import free_port

from baton.cli.bench import Answer, ask_all, bar, percentile, show, summarize
from baton.client import BatonClient, Finish
from baton.common.sampling import FinishReason, Mode
from baton.models.conversations.probes import recall_probes

MODEL = ROOT / "models" / "baton_tiny"
FINISH = Finish(
    reason=FinishReason.STOP,
    prompt_tokens=100,
    completion_tokens=5,
    cached_tokens=16,
    request_id="r1",
    mode=Mode.DISAGG,
    prefill_worker="p0",
    decode_worker="d0",
    kv_bytes=2048,
    kv_blocks=2,
    transport="nixl",
    ttft_s=0.25,
    tpot_s=0.01,
    prefill_computed_tokens=84,
    decode_forwarded_tokens=4,
    decode_cached_tokens=0,
    attempts=1,
)


async def test_a_cluster_answers_right(redis_url: str) -> None:
    async with run_cluster(MODEL, redis_url, dtype="float32") as cluster:
        router = f"127.0.0.1:{cluster.router.grpc_port}"
        probes = recall_probes(1, 10, num_tokens=200, num_facts=8)
        async with BatonClient(router) as client:
            first = await ask_all(client, probes, concurrency=4)
            again = await ask_all(client, probes, concurrency=4)
        assert [answer.said for answer in first] == [probe.turns[0].assistant for probe in probes]
        assert [answer.depth for answer in first] == [probe.depth for probe in probes]
        summary = summarize(first)
        assert summary["accuracy"] == 1.0
        assert summary["modes"] == {"disagg": 10}
        assert [row.asked for row in summary["deciles"]] == [1] * 10
        assert summary["kv_bytes"] > 0
        assert summarize(again)["accuracy"] == 1.0
        assert summarize(again)["cached_tokens"] > summary["cached_tokens"]

        flags = ("--requests", "4", "--seed", "2", "--router", router)
        code, out = await command("bench", "recall", *flags, "--tokens", "200", "--json")
        assert (code, json.loads(out)["right"]) == (0, 4)
        # Longer than the context: refused, thus not right.
        code, out = await command("bench", "recall", *flags, "--tokens", "9000")
        assert code == 1
        assert "0 of 4, 0.0%" in out
        await cluster.expect_rest()


async def command(*arguments: str) -> tuple[int | None, str]:
    """Exit code and stdout, while this process goes on serving."""
    process = await asyncio.create_subprocess_exec(
        *BATON,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=environment(),
    )
    out, _ = await process.communicate()
    return process.returncode, out.decode()


def test_a_wrong_answer_is_counted_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    right = Answer(depth=0.05, expected="4821", said="4821", finish=FINISH)
    answers = [
        right,
        replace(right, depth=0.07, said="4812"),
        Answer(depth=0.93, expected="1234", error="all queues are full"),
    ]
    summary = summarize(answers)
    assert summary["accuracy"] == pytest.approx(1 / 3)
    assert (summary["failed"], summary["errors"]) == (1, {"all queues are full": 1})
    assert (summary["prompt_tokens"], summary["cached_tokens"]) == (200, 32)
    show(summary, answers)
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[1].split()[:6] == ["0", "to", "10", "%", "2", "1"]
    assert lines[1].endswith(f" 50%  {'█' * 10}{'·' * 10}")
    assert lines[10].endswith(f"  0%  {'·' * 20}")
    assert "1 of 3, 33.3%" in shown.out
    assert "p50 250.0 ms, p99 250.0 ms" in shown.out
    assert "1 failed: all queues are full" in shown.err
    assert "wrong: '4812' for '4821' at 7%, p0 → d0, request r1" in shown.err


def test_an_answer_that_failed_is_never_right() -> None:
    assert not Answer(depth=0.5, expected="", error="gone").is_right


def test_percentiles_are_values_that_occurred() -> None:
    hundred = [float(value) for value in range(1, 101)]
    assert [percentile(hundred, share) for share in (0.5, 0.99, 1.0)] == [50.0, 99.0, 100.0]
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([], 0.5) is None


def test_bars() -> None:
    assert bar(1.0) == "█" * 20
    assert bar(0.0) == "·" * 20


def test_no_router_is_exit_code_3() -> None:
    done = baton("bench", "recall", "--requests", "2", "--router", f"127.0.0.1:{free_port()}")
    assert done.returncode == 3
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "flags", [("--requests", "0"), ("--min-accuracy", "1.5"), ("--concurrency", "-1")]
)
def test_wrong_flags_are_exit_code_2(flags: tuple[str, str], tmp_path: Path) -> None:
    done = baton("bench", "recall", *flags, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
