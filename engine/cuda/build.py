"""A model on a GPU: weights, then the arena in what is left, then the graphs over both."""

import torch

from baton.common.errors import ConfigError
from baton.common.progress import Progress
from baton.engine.arena import Arena
from baton.engine.assembly import OVERLAPPED_STEPS, Machinery, load_format_of, num_blocks_of
from baton.engine.checkpoint import LoadFormat, weights_id
from baton.engine.cuda.graphs import DecodeGraphs
from baton.engine.cuda.inputs import Planner
from baton.engine.cuda.memory import free_for_arena, measure_workspace, require_plain_memory
from baton.engine.cuda.model import CudaModel
from baton.engine.cuda.runner import CudaRunner
from baton.engine.engine_config import EngineConfig
from baton.engine.model_config import ModelConfig
from baton.engine.runner import arena_layout
from baton.engine.weights import load_weights


def build(
    config: EngineConfig, model_config: ModelConfig, device: torch.device, progress: Progress
) -> Machinery:
    """Raises ModelError for a model folder that cannot be used, ConfigError where there is no such
    GPU or too little memory on it."""
    _require(device)
    device = torch.device(
        "cuda", torch.cuda.current_device() if device.index is None else device.index
    )
    torch.cuda.set_device(device)
    load_format = load_format_of(config)
    identity = _identity(config, load_format, device)
    weights = load_weights(
        config.model, model_config, load_format, device=device, progress=progress
    )
    stream = torch.cuda.Stream(device)
    planner = Planner(model_config, device)
    max_rows = min(config.max_num_seqs, config.max_num_batched_tokens)
    with torch.cuda.stream(stream):
        model = CudaModel(model_config, weights, device)
        layout = arena_layout(model_config, config.block_size)
        measure_workspace(
            model,
            planner,
            layout,
            max_rows=max_rows,
            max_tokens=min(config.max_num_batched_tokens, model_config.max_model_len),
        )
        num_blocks = num_blocks_of(
            config, layout.block_bytes, lambda: _room(config, device, layout.block_bytes)
        )
        arena = Arena(layout, num_blocks, str(device))
        require_plain_memory(arena)
        graphs = None
        if config.cuda_graphs:
            graphs = DecodeGraphs(
                model,
                arena.tensor,
                planner,
                max_rows=max_rows,
                max_tokens=num_blocks * config.block_size,
                stream=stream,
                progress=lambda done, total: progress("capturing CUDA graphs", done, total),
            )
    runner = CudaRunner(model, arena, planner, max_rows=max_rows, stream=stream, graphs=graphs)
    return Machinery(
        arena=arena,
        runner=runner,
        stepper=runner,
        weights_id=identity,
        max_in_flight=OVERLAPPED_STEPS,
    )


def _require(device: torch.device) -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type != "cuda" or (device.index or 0) >= count:
        raise ConfigError(
            f"there is no {device} here: torch sees {count} GPUs; choose another device, or cpu",
            field="device",
        )


def _room(config: EngineConfig, device: torch.device, block_bytes: int) -> int:
    return free_for_arena(device, block_bytes, config.gpu_memory_share)


def _identity(config: EngineConfig, load_format: LoadFormat, device: torch.device) -> str:
    """Dummy weights are drawn on the device, and differ with its kind."""
    identity = weights_id(config.model, load_format)
    if load_format == "dummy":
        return f"{identity} {torch.cuda.get_device_name(device)}"
    return identity
