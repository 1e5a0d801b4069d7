"""`--sim-seeds N`: how many seeds; `--sim-seed S`: that one alone."""

import pytest
from sim.seeds import DEFAULT_SEEDS, chosen_seeds


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("simulation")
    group.addoption("--sim-seeds", type=int, default=DEFAULT_SEEDS, metavar="N")
    group.addoption("--sim-seed", type=int, default=None, metavar="S")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        seeds = chosen_seeds(metafunc.config)
        metafunc.parametrize("seed", seeds, ids=[f"seed_{seed}" for seed in seeds])
