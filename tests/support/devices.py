"""Where the KV arenas of tested clusters lie: host memory, or as TEST_KV_DEVICES says.

    TEST_KV_DEVICES=prefill=cuda:0,decode=cuda:1 pytest tests/faults

A device's arena needs the oracle model; with it the tests of faults run unchanged on GPU memory.
"""

import os

import pytest
import torch

DEVICES = dict(pair.split("=") for pair in os.environ.get("TEST_KV_DEVICES", "").split(",") if pair)


def device_of(role: str) -> str:
    return DEVICES.get(role, "cpu")


# Where a model runs: on the host, and on a GPU where there is one.
MODEL_DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
