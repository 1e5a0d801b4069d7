"""A model on its device: weights, arena, and what runs steps over them.

    cpu    the torch references, each step in place
    cuda   kernels and graphs, two steps in flight (baton.engine.cuda, imported only then)

The oracle model has no weights and runs on a thread of the host, wherever its arena lies.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from baton.common.errors import ConfigError
from baton.common.progress import Progress
from baton.common.randomness import Randomness
from baton.engine.arena import Arena
from baton.engine.checkpoint import LoadFormat, weights_id
from baton.engine.device import Device, InlineDevice, ThreadDevice
from baton.engine.engine_config import EngineConfig
from baton.engine.model import Model
from baton.engine.model_config import ORACLE, ModelConfig
from baton.engine.oracle import ORACLE_WEIGHTS_ID
from baton.engine.oracle_runner import ORACLE_MAX_DELAY_S, OracleRunner
from baton.engine.runner import ModelRunner, Runner, arena_layout
from baton.engine.sampler import Sampler
from baton.engine.stepper import HostStepper, Stepper
from baton.engine.weights import load_weights

DEFAULT_KV_MEMORY_BYTES: Final = 256 * 2**20
# One runs, one waits behind it: the host's work between two steps is hidden.
OVERLAPPED_STEPS: Final = 2


class WorkCount(Protocol):
    """The work that was done: what tests that count recomputation go by."""

    tokens_forwarded: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Machinery:
    """What an engine drives."""

    arena: Arena
    runner: WorkCount
    stepper: Stepper
    weights_id: str
    # How many steps may be in flight.
    max_in_flight: int


def assemble(
    config: EngineConfig,
    model_config: ModelConfig,
    randomness: Randomness,
    device: Device | None,
    progress: Progress,
) -> Machinery:
    """`device` runs the steps of a host; by default in place, for an oracle model late on a thread.

    Raises ModelError for a model folder that cannot be used, ConfigError for a device that is not
    there or an arena that does not fit.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if model_config.architecture == ORACLE:
        # A GPU does nothing for it: its arena lies there only when told to.
        place = "cpu" if config.device == "auto" else config.device
        return _oracle(config, model_config, device or _late(randomness), place)
    place = _resolve(config.device)
    if place != "cpu":
        # Not imported above: without a GPU nothing of it is loaded.
        from baton.engine.cuda.build import build

        return build(config, model_config, torch.device(place), progress)
    return _host(config, model_config, device or InlineDevice())


def load_format_of(config: EngineConfig) -> LoadFormat:
    return "dummy" if config.load_format == "dummy" else "safetensors"


def num_blocks_of(config: EngineConfig, block_bytes: int, default_bytes: Callable[[], int]) -> int:
    """The size of the arena in blocks. Raises ConfigError when not one fits."""
    if config.num_blocks is not None:
        return config.num_blocks
    if config.kv_memory_bytes is None:
        return max(1, default_bytes() // block_bytes)
    if config.kv_memory_bytes < block_bytes:
        raise ConfigError(
            f"kv_memory_bytes {config.kv_memory_bytes} holds no block: one of "
            f"{config.block_size} tokens takes {block_bytes} bytes; give more memory",
            field="kv_memory_bytes",
        )
    return config.kv_memory_bytes // block_bytes


def _resolve(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _late(randomness: Randomness) -> Device:
    return ThreadDevice(randomness, ORACLE_MAX_DELAY_S)


def _arena(config: EngineConfig, model_config: ModelConfig, place: str) -> Arena:
    layout = arena_layout(model_config, config.block_size)
    count = num_blocks_of(config, layout.block_bytes, lambda: DEFAULT_KV_MEMORY_BYTES)
    return Arena(layout, count, place)


def _oracle(
    config: EngineConfig, model_config: ModelConfig, device: Device, place: str
) -> Machinery:
    arena = _arena(config, model_config, place)
    runner = OracleRunner(model_config, arena)
    return _on_host(model_config, arena, runner, device, ORACLE_WEIGHTS_ID)


def _host(config: EngineConfig, model_config: ModelConfig, device: Device) -> Machinery:
    load_format = load_format_of(config)
    identity = weights_id(config.model, load_format)
    arena = _arena(config, model_config, "cpu")
    weights = load_weights(config.model, model_config, load_format)
    runner = ModelRunner(Model(model_config, weights), arena)
    return _on_host(model_config, arena, runner, device, identity)


def _on_host(
    model_config: ModelConfig, arena: Arena, runner: Runner, device: Device, identity: str
) -> Machinery:
    # In place there is nothing to overlap with.
    in_place = isinstance(device, InlineDevice)
    return Machinery(
        arena=arena,
        runner=runner,
        stepper=HostStepper(runner, Sampler(model_config.eos_token_ids), device),
        weights_id=identity,
        max_in_flight=1 if in_place else OVERLAPPED_STEPS,
    )
