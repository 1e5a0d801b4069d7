"""What is measured, and the rates of its device that the figures are held against."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from baton.engine.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """An engine on a GPU. Rates are of this device, in this run."""

    engine: Engine
    stream: torch.cuda.Stream
    max_num_seqs: int
    max_num_batched_tokens: int
    # Bytes per second of a device copy, read plus written.
    copy_rate: float
    # Operations per second of an 8192³ matrix product in the model's dtype.
    matmul_rate: float
    # Told what is measured now.
    say: Callable[[str], None]
