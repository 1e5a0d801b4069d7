"""Timing on a CUDA device: medians over replays of a captured graph, after a warm-up.

Kernels of microseconds are lost in the gaps between launches, so the calls are captured into one
CUDA graph and its replays are timed by events on the device. What is read must not sit in the L2
cache (50 to 60 MB): callers pass as many calls over different inputs as that takes, and the graph
runs them in turn.
"""

import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, Final

import torch

from baton.common.errors import InternalError

Call = Callable[[], Any]

# A replay that lasts this long hides the gap before it and the events' resolution.
MIN_REPLAY_S: Final = 2e-3
MAX_LAUNCHES: Final = 4096
MIN_REPLAYS: Final = 5
MIN_TURNS: Final = 20
MAX_REPLAYS: Final = 500
# A card that idled needs about this long to raise its clocks.
WARM_UP_S: Final = 0.1
COPY_BYTES: Final = 4 << 30
# ‖out − ref‖ / ‖ref‖ that bf16 operands and results explain.
BF16_TOLERANCE: Final = 1e-2


@dataclass
class Context:
    """What all groups of a run share."""

    device: torch.device
    budget_s: float
    # Told what is measured now.
    say: Callable[[str], None]

    @cached_property
    def copy_rate(self) -> float:
        """Bytes per second of a large copy on the device, read plus written: what memory gives."""
        self.say("device copy")
        source = random_bytes(COPY_BYTES, self.device)
        target = torch.empty_like(source)
        # Launched plainly: in a graph it would be a copy node, which is slower on some drivers.
        seconds = self.seconds_per_call(lambda: target.copy_(source), captured=False)
        return 2 * COPY_BYTES / seconds

    def seconds_per_call(self, calls: Call | Sequence[Call], *, captured: bool = True) -> float:
        return seconds_per_call(calls, self.budget_s, captured=captured)

    def seconds_side_by_side(self, calls: Mapping[str, Sequence[Call]]) -> dict[str, float]:
        return seconds_side_by_side(calls, self.budget_s)

    def release(self) -> None:
        """Hand freed memory back, for the next group to size itself by what is free."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()


def seconds_per_call(
    calls: Call | Sequence[Call], budget_s: float, *, captured: bool = True
) -> float:
    """Median seconds of one call. Several calls run in turn, as often as makes a replay long.

    Copies between GPUs take streams of both and are launched plainly: captured=False.
    """
    turn = [calls] if callable(calls) else list(calls)
    _warm_up(turn)
    once = _elapsed(lambda: _run(turn))
    rounds = math.ceil(MIN_REPLAY_S / max(once, 1e-6))
    rounds = max(1, min(rounds, MAX_LAUNCHES // len(turn)))
    calls = turn * rounds
    replay = _captured(calls) if captured else partial(_run, calls)
    return _median_seconds(replay, budget_s) / len(calls)


def seconds_side_by_side(calls: Mapping[str, Sequence[Call]], budget_s: float) -> dict[str, float]:
    """Median seconds of one replay of each graph, replayed in turns.

    A card under load draws more than it may and lowers its clocks: whoever is measured later is
    measured slower. In turns all meet the same card.
    """
    for turn in calls.values():
        _warm_up(turn)
    replays = {name: _captured(turn) for name, turn in calls.items()}
    once = sum(_elapsed(replay) for replay in replays.values())
    took: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(max(MIN_TURNS, min(MAX_REPLAYS, int(budget_s / once)))):
        for name, replay in replays.items():
            took[name].append(_elapsed(replay))
    return {name: statistics.median(seconds) for name, seconds in took.items()}


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """‖out − ref‖ / ‖ref‖ in fp64; infinite where anything is not a number."""
    exact = reference.double()
    error = float((out.double() - exact).norm() / exact.norm().clamp_min(1e-300))
    return error if math.isfinite(error) else math.inf


def check(
    what: str, out: torch.Tensor, reference: torch.Tensor, tolerance: float = BF16_TOLERANCE
) -> None:
    """Nothing is timed that is wrong: InternalError."""
    error = relative_error(out, reference)
    if error > tolerance:
        raise InternalError(
            f"{what}: the kernel is off its fp32 reference by {error:.2e}, "
            f"more than {tolerance:.0e}; no figure is taken of a wrong result"
        )


def check_equal(what: str, out: torch.Tensor, reference: torch.Tensor) -> None:
    """As `check`, bit for bit."""
    if not torch.equal(out, reference):
        raise InternalError(f"{what}: the result differs; no figure is taken of a wrong result")


def normal(
    *shape: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    scale: float = 1.0,
) -> torch.Tensor:
    """Fresh normal numbers: zeros hide errors, and run faster than real data."""
    return torch.empty(shape, device=device, dtype=dtype).normal_(0.0, scale)


def fill_normal_(tensor: torch.Tensor, chunk_bytes: int = 1 << 30) -> torch.Tensor:
    """Normal numbers in place, chunk by chunk: one call over 2^31 elements is slow or refused."""
    flat = tensor.view(-1)
    step = chunk_bytes // tensor.element_size()
    for start in range(0, flat.numel(), step):
        flat[start : start + step].normal_()
    return tensor


def random_bytes(count: int, device: torch.device) -> torch.Tensor:
    return fill_normal_(torch.empty(count // 2, device=device, dtype=torch.bfloat16))


def poison_(tensor: torch.Tensor) -> torch.Tensor:
    """What is not written shows."""
    return tensor.fill_(math.nan if tensor.dtype.is_floating_point else -1)


def _run(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _warm_up(calls: Sequence[Call]) -> None:
    """Compile and allocate on the stream of the graph, then run until the clocks are up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _run(calls)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    spent = 0.0
    while spent < WARM_UP_S:
        spent += max(_elapsed(lambda: _run(calls)), 1e-4)


def _median_seconds(replay: Callable[[], None], budget_s: float) -> float:
    replay()
    once = max(_elapsed(replay), 1e-6)
    count = max(MIN_REPLAYS, min(MAX_REPLAYS, int(budget_s / once)))
    # All at once: the device never waits for the host between two replays.
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        replay()
        event.record()
    events[-1].synchronize()
    return statistics.median(
        float(start.elapsed_time(end)) / 1e3 for start, end in pairwise(events)
    )


def _captured(calls: Sequence[Call]) -> Callable[[], None]:
    """A replay of all calls in turn; plain launches where they cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            _run(calls)
    except RuntimeError as error:
        torch.cuda.synchronize()
        warnings.warn(f"launched plainly, not as a graph: {error}", RuntimeWarning, stacklevel=2)
        return partial(_run, calls)
    return graph.replay


def _elapsed(work: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
