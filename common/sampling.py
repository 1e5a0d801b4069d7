"""How the next token is chosen, and why a request ended."""

from dataclasses import dataclass
from enum import Enum


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"


class Mode(Enum):
    """`DISAGG`: prefilled on one worker and handed over. `LOCAL`: no KV crossed."""

    DISAGG = "disagg"
    LOCAL = "local"


class Role(Enum):
    """What a worker is for. `UNIFIED` computes a prompt and its answer, and hands nothing over.

    As what a worker works on one request at present is `PREFILL` or `DECODE`, never `UNIFIED`.
    """

    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "unified"

    @property
    def decodes(self) -> bool:
        """Whether such a worker generates answers, and so may take a running one over."""
        return self is not Role.PREFILL


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Validated at the router; every field has its value here, none is absent.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 and `min_p` 0 switch those filters off.
    The draw for output position i depends on (`seed`, i) alone.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )
