"""The rotary embedding of a model, as its config.json describes it in the old or the new spelling.

Old: `rope_theta` beside `rope_scaling: {type | rope_type, factor, ...}`.
New (transformers 5): all in `rope_parameters: {rope_theta, rope_type, factor, ...}`.
"""

from dataclasses import dataclass
from typing import Final

from baton.engine.config_file import ConfigFile

KINDS: Final = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """`kind` says which of the further fields count; the others keep their defaults."""

    theta: float
    kind: str = "default"
    # linear, llama3, yarn: how far the context was stretched.
    factor: float = 1.0
    # llama3, yarn: the context length before it was stretched, in tokens.
    original_max_len: int = 0
    # llama3
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    # yarn
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def stretched_len(self, max_position_embeddings: int) -> int:
        """The longest context that the embedding was made for, in tokens."""
        if self.kind == "linear":
            return int(max_position_embeddings * self.factor)
        if self.kind == "yarn":
            return max(max_position_embeddings, int(self.original_max_len * self.factor))
        return max_position_embeddings


def read_rope(config: ConfigFile, max_position_embeddings: int) -> RopeConfig:
    """Raises `ModelError` for a kind that is not in `KINDS` and for missing parameters."""
    field = "rope_parameters" if config.has("rope_parameters") else "rope_scaling"
    scaling = config.nested(field)
    if scaling is None:
        _refuse_partial(config)
        return RopeConfig(theta=config.number("rope_theta", 10000.0))
    _refuse_partial(scaling if scaling.has("partial_rotary_factor") else config)
    kind_field = "rope_type" if scaling.has("rope_type") else "type"
    kind = scaling.text(kind_field, "default")
    source = scaling if scaling.has("rope_theta") else config
    theta = source.number("rope_theta", 10000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=scaling.number("factor"))
    original_max_len = scaling.size("original_max_position_embeddings", max_position_embeddings)
    if kind == "llama3":
        if scaling.number("high_freq_factor") <= scaling.number("low_freq_factor"):
            raise scaling.error("high_freq_factor", "must be above low_freq_factor")
        return RopeConfig(
            theta=theta,
            kind=kind,
            factor=scaling.number("factor"),
            original_max_len=original_max_len,
            low_freq_factor=scaling.number("low_freq_factor"),
            high_freq_factor=scaling.number("high_freq_factor"),
        )
    if kind == "yarn":
        return RopeConfig(
            theta=theta,
            kind=kind,
            factor=scaling.number("factor", max_position_embeddings / original_max_len),
            original_max_len=original_max_len,
            beta_fast=scaling.number("beta_fast", 32.0),
            beta_slow=scaling.number("beta_slow", 1.0),
            attention_factor=scaling.optional_number("attention_factor"),
            mscale=scaling.optional_number("mscale"),
            mscale_all_dim=scaling.optional_number("mscale_all_dim"),
            truncate=scaling.flag("truncate", True),
        )
    raise scaling.error(kind_field, f"not supported; supported are {', '.join(KINDS)}")


def _refuse_partial(config: ConfigFile) -> None:
    if config.number("partial_rotary_factor", 1.0) != 1.0:
        raise config.error("partial_rotary_factor", "only whole heads can be rotated (1.0)")
