"""Fixtures that many suites share: a Redis server, small random models, one torch thread,
and Triton's interpreter where there is no GPU."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    # Before Triton is imported: kernels are compiled on a GPU and interpreted elsewhere.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from baton.models.random_model import write_random_model


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    from support.redis_process import redis_process

    with redis_process() as server:
        yield server.url


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, hidden 64, fp32: fast, and right or wrong like any other."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    return write_random_model(
        folder,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        max_model_len=1024,
    )
