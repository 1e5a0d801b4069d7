"""Kernels' modules where Triton is not installed."""

import subprocess
import sys

WITHOUT_TRITON = """
import importlib.util, pkgutil, sys

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)

import torch
import baton.kernels
from baton.common.errors import ConfigError

names = [module.name for module in pkgutil.iter_modules(baton.kernels.__path__)]
for name in names:
    if not name.endswith("_hopper"):
        __import__(f"baton.kernels.{name}")
assert not [name for name in sys.modules if name.split(".")[0] == "triton"], "nothing loads it"

from baton.kernels.activation import silu_and_mul, silu_and_mul_triton

gate_up = torch.ones(2, 8)
print(len(names), tuple(silu_and_mul(gate_up).shape))
try:
    silu_and_mul_triton(gate_up)
except ConfigError as error:
    print(error.message)
"""


def test_references_run_and_launching_says_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_TRITON],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    counts, message = done.stdout.splitlines()
    assert counts.endswith("(2, 4)")
    assert int(counts.split()[0]) > 15, "the modules were found"
    assert "kvbaton[cuda]" in message
