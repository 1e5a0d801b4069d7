"""The linear layers of a decode step: bytes of weights against a device copy, and cuBLAS.

All 32 layers have weights of their own, 14 GB, so that nothing of a layer is cached when its turn
comes again.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

import torch

from baton.kernels.bench.figures import Figure
from baton.kernels.bench.geometry import FFN, HIDDEN, NUM_LAYERS, QKV_WIDTH
from baton.kernels.bench.harness import Context, check, normal, poison_
from baton.kernels.linear_hopper import LinearWorkspace, can_stream, linear_hopper

TOKENS: Final = (1, 16, 64)
# Rows by columns of a layer's weights, in the order of a step.
SHAPES: Final = {
    "qkv": (QKV_WIDTH, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate up": (2 * FFN, HIDDEN),
    "down": (HIDDEN, FFN),
}
WEIGHT_SCALE: Final = 0.02
TARGET_OF_ALL: Final = 0.90
TARGET_OF_SHAPE: Final = 0.75

# out[M, N] of x[M, K] and weight[N, K].
Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]


def measure(context: Context) -> Iterator[Figure]:
    """None where the kernel does not run."""
    probe = normal(1, HIDDEN, device=context.device)
    if not can_stream(probe, probe):
        context.say("weights: needs a Hopper GPU")
        return
    context.say("weights: filling 14 GB")
    weights = {
        name: [normal(*shape, device=context.device, scale=WEIGHT_SCALE) for _ in range(NUM_LAYERS)]
        for name, shape in SHAPES.items()
    }
    for num_tokens in TOKENS:
        _check(context, weights, num_tokens)
        context.say(f"weights M={num_tokens}")
        in_turn = [(name, layer) for layer in range(NUM_LAYERS) for name in SHAPES]
        yield _figure(context, weights, in_turn, num_tokens, "all", TARGET_OF_ALL)
        for name in SHAPES:
            context.say(f"weights M={num_tokens} {name}")
            of_shape = [(name, layer) for layer in range(NUM_LAYERS)]
            yield _figure(context, weights, of_shape, num_tokens, name, TARGET_OF_SHAPE)


def _figure(
    context: Context,
    weights: dict[str, list[torch.Tensor]],
    order: Sequence[tuple[str, int]],
    num_tokens: int,
    label: str,
    target: float,
) -> Figure:
    num_bytes = sum(weights[name][layer].nbytes for name, layer in order)
    stream = partial(_ours, LinearWorkspace(context.device))
    took = context.seconds_side_by_side(
        {
            "ours": _calls(context, weights, order, num_tokens, stream),
            "cuBLAS": _calls(context, weights, order, num_tokens, _cublas),
        }
    )
    ours, cublas = took["ours"], took["cuBLAS"]
    if label == "all":
        what = f"all linear layers of a step of {num_tokens} tokens"
    else:
        rows, columns = SHAPES[label]
        what = f"{label} ({rows} x {columns}) of {NUM_LAYERS} layers, {num_tokens} tokens"
    return Figure(
        name=f"weights M={num_tokens} {label}",
        what=f"{what}, weights read",
        achieved=num_bytes / ours / 1e9,
        unit="GB/s",
        limit=context.copy_rate / 1e9,
        limit_name="device copy",
        rival=num_bytes / cublas / 1e9,
        rival_name="cuBLAS",
        target=target,
        details={"us": ours * 1e6, "cublas_us": cublas * 1e6, "weight_bytes": num_bytes},
    )


def _ours(
    workspace: LinearWorkspace, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor
) -> object:
    return linear_hopper(x, weight, workspace, out=out)


def _cublas(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> object:
    return torch.mm(x, weight.t(), out=out)


def _calls(
    context: Context,
    weights: dict[str, list[torch.Tensor]],
    order: Sequence[tuple[str, int]],
    num_tokens: int,
    linear: Linear,
) -> list[Callable[[], object]]:
    device = context.device
    x = {name: normal(num_tokens, shape[1], device=device) for name, shape in SHAPES.items()}
    out = {
        name: torch.empty(num_tokens, shape[0], device=device, dtype=torch.bfloat16)
        for name, shape in SHAPES.items()
    }
    return [partial(linear, x[name], weights[name][layer], out[name]) for name, layer in order]


def _check(context: Context, weights: dict[str, list[torch.Tensor]], num_tokens: int) -> None:
    workspace = LinearWorkspace(context.device)
    for name, (rows, columns) in SHAPES.items():
        x = normal(num_tokens, columns, device=context.device)
        out = poison_(torch.empty(num_tokens, rows, device=context.device, dtype=torch.bfloat16))
        weight = weights[name][NUM_LAYERS - 1]
        linear_hopper(x, weight, workspace, out=out)
        check(f"linear {name}, {num_tokens} tokens", out, x.float() @ weight.float().t())
