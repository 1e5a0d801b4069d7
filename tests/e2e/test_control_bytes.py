"""KV never travels on gRPC: control bytes per request do not grow with the model."""

from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from support.cluster import run_cluster
from support.ports import free_port
from support.tcp_proxy import tcp_proxy

from baton.models.random_model import write_random_model

PROMPT = [5 + index % 400 for index in range(200)]
OUTPUT = 32
REQUESTS = 8


async def control_bytes_per_request(model: Path, redis_url: str) -> tuple[float, float]:
    """Bytes on all worker ports per request, and KV bytes per request."""
    async with AsyncExitStack() as stack:
        targets = [free_port(), free_port()]
        proxies = [await stack.enter_async_context(tcp_proxy(port)) for port in targets]
        cluster = await stack.enter_async_context(
            run_cluster(
                model,
                redis_url,
                per_worker=[
                    {
                        "listen": f"127.0.0.1:{target}",
                        "advertise": f"127.0.0.1:{proxy.port}",
                    }
                    for target, proxy in zip(targets, proxies, strict=True)
                ],
            )
        )
        await cluster.generate(PROMPT[:3], max_tokens=2)
        before = sum(proxy.num_bytes for proxy in proxies)
        kv_bytes = 0
        for index in range(REQUESTS):
            prompt = [index + 5, *PROMPT]
            answer = await cluster.generate(prompt, max_tokens=OUTPUT)
            kv_bytes += answer.report.kv_bytes
        control = sum(proxy.num_bytes for proxy in proxies) - before
    return control / REQUESTS, kv_bytes / REQUESTS


async def test_control_bytes_do_not_grow_with_hidden_size_or_layers(
    tmp_path: Path, redis_url: str
) -> None:
    small = write_random_model(
        tmp_path / "small",
        hidden_size=64,
        num_layers=1,
        num_heads=4,
        num_kv_heads=1,
        head_dim=16,
        intermediate_size=128,
        max_model_len=512,
    )
    large = write_random_model(
        tmp_path / "large",
        hidden_size=256,
        num_layers=6,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        intermediate_size=512,
        max_model_len=512,
    )
    small_control, small_kv = await control_bytes_per_request(small, redis_url)
    large_control, large_kv = await control_bytes_per_request(large, redis_url)
    assert large_kv == pytest.approx(48 * small_kv), "the data plane does grow: 6 x 4 x 2"
    # Slower steps take more heartbeats, and share fewer frames: never as much as the KV grows.
    assert large_control < 2 * small_control
    # A handful of bytes per prompt token (two submits) and a frame per output token.
    assert large_control < 16 * len(PROMPT) + 250 * OUTPUT
    assert large_control < large_kv / 20
