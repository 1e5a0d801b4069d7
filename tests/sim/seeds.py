"""Which seeds are simulated."""

from typing import Final

import pytest

DEFAULT_SEEDS: Final = 500


def chosen_seeds(config: pytest.Config) -> list[int]:
    """`--sim-seed S` alone, or the first `--sim-seeds N`."""
    only = config.getoption("--sim-seed", None)
    if only is not None:
        return [only]
    return list(range(config.getoption("--sim-seeds", DEFAULT_SEEDS)))
