"""Figures that tests of faults measure: shown at the end of a run, written when asked.

make test-faults ARGS=--write-figures       # into benchmarks/results/reliability.json
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fault_transport import FaultScript
from support.faulty_mesh import FaultyMesh, MeshMaker
from support.figures import Figure, Figures
from support.oracle_model import write_oracle_model
from support.trials import WorkerKilled

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "reliability.json"
_FIGURES = pytest.StashKey[Figures]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-figures", action="store_true", help=f"write what was measured to {RESULTS.name}"
    )


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    rows = config.stash.get(_FIGURES, Figures()).rows()
    if not rows:
        return
    terminalreporter.section("figures")
    for name, value, unit in rows:
        terminalreporter.write_line(f"{value:12.3f} {unit:<10} {name}")
    if config.getoption("--write-figures", default=False):
        kept = [
            {"name": name, "value": round(value, 4), "unit": unit} for name, value, unit in rows
        ]
        RESULTS.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def figure(pytestconfig: pytest.Config) -> Figure:
    """Note a measured value."""
    return pytestconfig.stash.setdefault(_FIGURES, Figures())


@pytest.fixture(scope="session")
def oracle_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_oracle_model(tmp_path_factory.mktemp("models") / "oracle")


@pytest.fixture
def faulty_mesh(oracle_model: Path) -> Iterator[MeshMaker]:
    made: list[FaultyMesh] = []

    def make(script: FaultScript | None = None, **sizes: Any) -> FaultyMesh:
        mesh = FaultyMesh(oracle_model, script or FaultScript(), **sizes)
        made.append(mesh)
        return mesh

    yield make
    for mesh in made:
        mesh.close()


@pytest.fixture(autouse=True)
def no_tracebacks(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """G7: nothing that this process logs has a traceback, but for workers that a test killed.

    gRPC's own are left out: of peers that hung up during a write, and of two loops that look at its
    one queue of events, as processes of Baton never have.
    """
    yield
    found = [
        record.getMessage()
        for record in caplog.get_records("call")
        if record.levelno >= logging.ERROR
        and record.exc_info
        and record.exc_info[0] is not WorkerKilled
        and not record.name.startswith("grpc.")
        and "PollerCompletionQueue" not in record.getMessage()
    ]
    assert found == []
