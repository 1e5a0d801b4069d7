"""Triton, where it is installed.

Kernels stand beside the torch references that run without them, and a worker on a CPU needs no
Triton: there the kernels of a module are placeholders that nobody can launch.

Programmatic dependent launch (PDL): a kernel launched with `launch_pdl=True` starts while the one
before it in the stream drains. It must call `gdc_wait()` before it touches anything that an earlier
kernel writes, or writes anything that an earlier one reads. Only Hopper and later compile it, and
no interpreter runs it, hence the constexpr PDL that such kernels take from `can_overlap_launches`.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

import torch

from baton.common.errors import ConfigError

HAS_TRITON: Final = find_spec("triton") is not None


class _Missing:
    """Stands for Triton's names where there is no Triton; launching says what to do."""

    def __getattr__(self, name: str) -> "_Missing":
        return self

    def __call__(self, *_arguments: Any, **_options: Any) -> "_Missing":
        return self

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*_arguments: Any, **_options: Any) -> None:
            raise ConfigError(
                "a Triton kernel was to be launched, but Triton is not installed here; "
                "pip install 'kvbaton[cuda]', or run on the CPU"
            )

        return launch


def _module(name: str) -> Any:
    return import_module(name) if HAS_TRITON else _Missing()


triton: Any = _module("triton")
tl: Any = _module("triton.language")
gdc_wait: Any = _module("triton.language.extra.cuda").gdc_wait
gdc_launch_dependents: Any = _module("triton.language.extra.cuda").gdc_launch_dependents


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the placeholder."""
    return triton.jit(function)


def can_overlap_launches(tensor: torch.Tensor) -> bool:
    """Whether kernels on `tensor`'s device can start before the one ahead of them has ended."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (9, 0)


def num_multiprocessors(device: torch.device) -> int:
    """Of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def cdiv(a: int, b: int) -> int:
    """Division rounded up, on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`, on the host."""
    return 1 << max(n - 1, 0).bit_length()
