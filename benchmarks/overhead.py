"""What a cluster adds to the model's own time, on one host and one torch thread per process.

The same engine runs the same prompts twice in turn: called in this process, and as router, prefill
worker and decode worker over gRPC and NIXL. Compared by ratio within one run; prompts are new in
each round, so that no prefix cache helps either side.

    python benchmarks/overhead.py [--rounds 5] [--json FILE]
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
import uvloop
from rich.console import Console
from rich.table import Table

from baton.cli.cluster import Cluster, Plan
from baton.client.client import BatonClient
from baton.common.sampling import SamplingParams
from baton.engine.llm import LLM
from baton.models.random_model import write_random_model

PROMPT_TOKENS = 64
OUTPUT_TOKENS = 256
STREAMS = (1, 16)
TARGET_RATIO = 0.7
ROUTER_REQUESTS = 48
ROUTER_OUTPUTS = (8, 128)


@dataclass
class Arm:
    """Tokens per second of each round."""

    alone: list[float] = field(default_factory=list)
    cluster: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Median of the rounds' ratios: both arms of a round met the same machine."""
        pairs = zip(self.cluster, self.alone, strict=True)
        return statistics.median(through / alone for through, alone in pairs)


@dataclass
class RouterCost:
    """CPU of the router process, from two runs that differ in output length alone."""

    us_per_request: float
    us_per_token: float


def prompts(count: int, source: random.Random) -> list[list[int]]:
    return [[source.randrange(5, 500) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def run_alone(llm: LLM, asked: list[list[int]]) -> float:
    sampling = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
    start = time.perf_counter()
    done = llm.generate(asked, sampling)
    took = time.perf_counter() - start
    assert all(len(completion.token_ids) == OUTPUT_TOKENS for completion in done)
    return len(asked) * OUTPUT_TOKENS / took


async def run_cluster(client: BatonClient, asked: list[list[int]], output: int) -> float:
    async def one(prompt: list[int]) -> int:
        count = 0
        async for chunk in client.generate(
            prompt, max_tokens=output, temperature=0.0, ignore_eos=True
        ):
            count += len(chunk.token_ids)
        return count

    start = time.perf_counter()
    counts = await asyncio.gather(*(one(prompt) for prompt in asked))
    took = time.perf_counter() - start
    assert counts == [output] * len(asked)
    return len(asked) * output / took


def step_ms(llm: LLM, source: random.Random) -> float:
    """Milliseconds of one decode step of one sequence, alone."""
    rates = [run_alone(llm, prompts(1, source)) for _ in range(3)]
    return 1000 / max(rates)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def router_cost(client: BatonClient, pid: int, source: random.Random) -> RouterCost:
    seconds = []
    for output in ROUTER_OUTPUTS:
        before = cpu_seconds(pid)
        for _ in range(ROUTER_REQUESTS // 16):
            await run_cluster(client, prompts(16, source), output)
        seconds.append(cpu_seconds(pid) - before)
    short, long = (ROUTER_REQUESTS * output for output in ROUTER_OUTPUTS)
    per_token = (seconds[1] - seconds[0]) / (long - short)
    per_request = (seconds[0] - per_token * short) / ROUTER_REQUESTS
    return RouterCost(per_request * 1e6, per_token * 1e6)


async def measure(rounds: int, console: Console) -> tuple[float, dict[int, Arm], RouterCost]:
    source = random.Random(0)
    arms = {streams: Arm() for streams in STREAMS}
    with tempfile.TemporaryDirectory() as folder:
        model = write_random_model(Path(folder) / "model", num_layers=3, hidden_size=256)
        torch.set_num_threads(1)
        llm = LLM(model, num_threads=1)
        alone_ms = step_ms(llm, source)
        ports = {"http_port": 0, "grpc_port": 0, "admin_port": 0}
        cluster = Cluster(
            Plan(model=str(model), router_flags=ports, worker_flags={"num_threads": 1})
        )
        try:
            await cluster.start()
            async with BatonClient(cluster.endpoints.grpc) as client:
                await run_cluster(client, prompts(4, source), 16)
                for index in range(rounds):
                    for streams, arm in arms.items():
                        arm.alone.append(run_alone(llm, prompts(streams, source)))
                        asked = prompts(streams, source)
                        arm.cluster.append(await run_cluster(client, asked, OUTPUT_TOKENS))
                        console.print(
                            f"round {index + 1}/{rounds}, {streams} streams: "
                            f"{arm.alone[-1]:.0f} alone, {arm.cluster[-1]:.0f} through the cluster"
                        )
                cost = await router_cost(client, cluster.router_pid, source)
        finally:
            await cluster.stop()
    return alone_ms, arms, cost


def show(alone_ms: float, arms: dict[int, Arm], cost: RouterCost, console: Console) -> None:
    table = Table(title=f"tokens per second; one decode step alone takes {alone_ms:.2f} ms")
    for name in ("streams", "engine alone", "through the cluster", "ratio", "target"):
        table.add_column(name, justify="right")
    for streams, arm in arms.items():
        table.add_row(
            str(streams),
            f"{statistics.median(arm.alone):.0f}",
            f"{statistics.median(arm.cluster):.0f}",
            f"{arm.ratio:.2f}",
            f"≥ {TARGET_RATIO}",
        )
    console.print(table)
    router = Table(title="CPU that the router adds")
    router.add_column("per request", justify="right")
    router.add_column("per token", justify="right")
    router.add_row(f"{cost.us_per_request:.0f} µs", f"{cost.us_per_token:.0f} µs")
    console.print(router)


def commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console()
    alone_ms, arms, cost = uvloop.run(measure(arguments.rounds, console))
    show(alone_ms, arms, cost, console)
    if arguments.json is not None:
        result = {
            "benchmark": "overhead",
            "commit": commit(),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
            "versions": {name: version(name) for name in ("torch", "grpcio", "nixl-cu12")},
            "step_ms_alone": alone_ms,
            "streams": {
                str(streams): {**asdict(arm), "ratio": arm.ratio} for streams, arm in arms.items()
            },
            "router": asdict(cost),
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
