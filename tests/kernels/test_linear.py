"""The linear layer for few tokens: the Triton twin everywhere, the streaming kernel on a GPU."""

import pytest
import torch
from support.kernel_checks import (
    DEVICE,
    DTYPES,
    TOLERANCE,
    needs_gpu,
    needs_triton,
    normal,
    poisoned,
    relative_error,
)

from baton.kernels.linear import linear, linear_triton

# Tokens, weight rows, depth.
SHAPES = [(1, 64, 64), (3, 130, 72), (16, 96, 200), (17, 64, 129), (65, 70, 64)]
STREAMED = [
    (1, 128, 64), (1, 4096, 4096), (5, 72, 72), (8, 6144, 4096), (16, 512, 14336),
    (20, 130, 4096), (33, 1000, 1032), (64, 28672, 4096), (64, 4096, 14336),
]  # fmt: skip


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    result = x.double() @ weight.double().T
    return result if bias is None else result + bias.double()


def make(
    shape: tuple[int, int, int], dtype: torch.dtype, has_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    num_tokens, width, depth = shape
    x = normal(num_tokens, depth, dtype=dtype)
    weight = normal(width, depth, dtype=dtype, scale=depth**-0.5)
    return x, weight, normal(width, dtype=dtype) if has_bias else None


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_equals_fp64(dtype: torch.dtype) -> None:
    x, weight, bias = make(SHAPES[2], dtype, has_bias=True)
    assert relative_error(linear(x, weight, bias), exact(x, weight, bias)) < TOLERANCE[dtype]


@needs_triton
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_fp64(
    shape: tuple[int, int, int], dtype: torch.dtype, has_bias: bool
) -> None:
    x, weight, bias = make(shape, dtype, has_bias)
    out = poisoned(shape[0], shape[1], dtype=dtype)
    linear_triton(x, weight, bias=bias, out=out)
    assert relative_error(out, exact(x, weight, bias)) < TOLERANCE[dtype]


@needs_triton
def test_no_tokens_are_no_work() -> None:
    x, weight, _ = make((0, 64, 64), torch.float32, has_bias=False)
    assert linear_triton(x, weight).shape == (0, 64)


@needs_gpu
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", STREAMED)
def test_streamed_equals_fp64(
    shape: tuple[int, int, int], dtype: torch.dtype, has_bias: bool
) -> None:
    from baton.kernels.linear_hopper import LinearWorkspace, can_stream, linear_hopper

    x, weight, bias = make(shape, dtype, has_bias)
    if not can_stream(x, weight):
        pytest.skip("not a Hopper GPU")
    workspace = LinearWorkspace(DEVICE)
    out = poisoned(shape[0], shape[1], dtype=dtype)
    linear_hopper(x, weight, workspace, bias=bias, out=out)
    assert relative_error(out, exact(x, weight, bias)) < TOLERANCE[dtype]
    again = linear_hopper(x, weight, workspace, bias=bias)
    assert torch.equal(out, again), "whoever comes last, the sum is the same"
    assert not workspace.counters.any(), "counters rest at 0"


@needs_triton
def test_a_result_between_others_is_refused() -> None:
    x, weight, _ = make((2, 64, 64), torch.float32, has_bias=False)
    wider = poisoned(2, 128, dtype=torch.float32)
    with pytest.raises(AssertionError, match="tokens follow each other"):
        linear_triton(x, weight, out=wider[:, :64])
    assert wider.isnan().all()


@needs_gpu
def test_streamed_products_of_a_graph_wait_for_each_other() -> None:
    """In a graph each launch starts while the one before drains. Its x is the other's result, and
    all use one workspace."""
    from baton.kernels.linear_hopper import LinearWorkspace, can_stream, linear_hopper

    x, first, _ = make((16, 1024, 1024), torch.bfloat16, has_bias=False)
    if not can_stream(x, first):
        pytest.skip("not a Hopper GPU")
    weights = [make((1, 1024, 1024), torch.bfloat16, has_bias=False)[1] for _ in range(20)]
    outs = [poisoned(16, 1024, dtype=torch.bfloat16) for _ in weights]
    workspace = LinearWorkspace(DEVICE)

    def run() -> None:
        for weight, given, out in zip(weights, [x, *outs], outs, strict=False):
            linear_hopper(given, weight, workspace, out=out)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(5):
        x.copy_(torch.randn_like(x))
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        given = x
        for weight, out in zip(weights, outs, strict=True):
            # Each from the one that the graph computed before it: errors do not add up.
            assert relative_error(out, exact(given, weight, None)) < TOLERANCE[torch.bfloat16]
            given = out


@needs_gpu
def test_streamed_products_in_a_row_wait_for_each_other() -> None:
    """Each launch may start while the one before drains; its x is the other's result."""
    from baton.kernels.linear_hopper import LinearWorkspace, can_stream, linear_hopper

    x, weight, _ = make((16, 1024, 1024), torch.bfloat16, has_bias=False)
    if not can_stream(x, weight):
        pytest.skip("not a Hopper GPU")
    workspace = LinearWorkspace(DEVICE)
    streamed, expected = x, x
    for _ in range(20):
        streamed = linear_hopper(streamed, weight, workspace)
        expected = linear(expected, weight)
    # Both round each of the 20 results to bf16, in another order of summing.
    assert relative_error(streamed, expected) < 5 * TOLERANCE[torch.bfloat16]


@needs_gpu
def test_the_choice_serves_every_shape() -> None:
    from baton.kernels.linear import linear_cuda
    from baton.kernels.linear_hopper import LinearWorkspace

    workspace = LinearWorkspace(DEVICE)
    for shape in [(1, 64, 64), (64, 128, 512), (65, 128, 512), (4, 40, 36)]:
        x, weight, bias = make(shape, torch.bfloat16, has_bias=True)
        for width in (shape[1], shape[1] + 8):
            wider = poisoned(shape[0], width, dtype=torch.bfloat16)
            out = wider[:, : shape[1]]
            linear_cuda(x, weight, workspace, bias=bias, out=out)
            assert relative_error(out, exact(x, weight, bias)) < TOLERANCE[torch.bfloat16]
            assert wider[:, shape[1] :].isnan().all()
