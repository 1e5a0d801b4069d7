"""`baton bench kernels`: what it says of figures, and what it refuses. Measuring needs a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.command import environment
from support.house import ROOT

from baton.cli.bench_kernels import show
from baton.cli.main import run
from baton.common.errors import ConfigError
from baton.kernels.bench.figures import Figure, missed, plain_table, shown
from baton.kernels.bench.runner import GROUPS, Report, chosen_groups

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")

DECODE = Figure(
    name="decode",
    what="KV read",
    achieved=4100.0,
    unit="GB/s",
    limit=4200.0,
    limit_name="device copy",
    target=0.98,
)
PREFILL = Figure(
    name="prefill",
    what="causal",
    achieved=610.0,
    unit="TFLOP/s",
    rival=600.0,
    rival_name="cuDNN",
    against="rival",
    target=0.95,
    details={"us": 12.5},
)
SAMPLING = Figure(
    name="sampling",
    what="top-p",
    achieved=0.25,
    unit="ms",
    limit=0.3,
    limit_name="allowed",
    rival=8.0,
    rival_name="torch sort",
    target=1.0,
    less_is_better=True,
)
DIGEST = Figure(name="digest", what="told alone", achieved=12.0, unit="GB/s")


def report(*figures: Figure) -> Report:
    return Report(
        commit="abc",
        versions={"torch": "2.11"},
        machine={"gpu": "NVIDIA H200", "count": 1},
        budget_s=1.0,
        figures=list(figures),
    )


def test_a_ratio_compares_with_what_it_is_held_against() -> None:
    assert DECODE.ratio == pytest.approx(4100 / 4200)
    assert PREFILL.ratio == pytest.approx(610 / 600)
    assert SAMPLING.ratio == pytest.approx(0.3 / 0.25)
    assert DIGEST.ratio is None


def test_a_target_is_reached_by_the_ratio() -> None:
    assert [figure.reached for figure in (DECODE, PREFILL, SAMPLING, DIGEST)] == [
        False,
        True,
        True,
        None,
    ]
    assert missed([DECODE, PREFILL, DIGEST]) == ["decode"]


def test_without_its_rival_a_target_is_not_reached() -> None:
    alone = Figure(name="a", what="", achieved=1.0, unit="s", against="rival", target=0.5)
    assert alone.ratio is None
    assert alone.reached is False


@pytest.mark.parametrize(
    ("value", "text"),
    [(4211.4, "4211 GB/s"), (99.96, "100.0 GB/s"), (1.234, "1.23 GB/s"), (0.12345, "0.1235 GB/s")],
)
def test_three_digits_that_matter(value: float, text: str) -> None:
    assert shown(value, "GB/s") == text


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    show(report(DECODE, PREFILL, SAMPLING, DIGEST), as_json=False)
    written = capsys.readouterr()
    assert [" ".join(line.split()) for line in written.out.splitlines()] == [
        "figure measured against ratio target also",
        "decode 4100 GB/s 4200 GB/s device copy 0.976 0.98 ✗",
        "prefill 610 TFLOP/s 600 TFLOP/s cuDNN 1.017 0.95 ✓",
        "sampling 0.2500 ms 0.3000 ms allowed 1.200 1 ✓ 8.00 ms torch sort",
        "digest 12.0 GB/s",
    ]
    assert written.err == "1 of 4 short of the target: decode\n"


def test_the_plain_table_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    figures = (DECODE, PREFILL, SAMPLING, DIGEST)
    show(report(*figures), as_json=False)
    assert plain_table(figures) == capsys.readouterr().out


def test_json_and_the_file_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_two = report(PREFILL, DIGEST)
    of_two.write(tmp_path / "figures.json")
    show(of_two, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "figures.json").read_text())
    assert (found["commit"], found["machine"]["gpu"]) == ("abc", "NVIDIA H200")
    first, second = found["figures"]
    assert (first["rival"], first["reached"], first["details"]) == (600.0, True, {"us": 12.5})
    assert first["ratio"] == pytest.approx(610 / 600)
    assert (second["ratio"], second["reached"]) == (None, None)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.json cannot be written: No such file"):
        report(DIGEST).write(tmp_path / "none" / "a.json")


def test_groups_come_in_one_order() -> None:
    assert chosen_groups("") == list(GROUPS)
    assert chosen_groups("sampling, decode") == ["decode", "sampling"]


def test_an_unknown_group_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="there is no group encode; there are decode, prefill"):
        chosen_groups("decode,encode")
    assert run(["bench", "kernels", "--only", "encode"]) == 1
    assert "no group encode" in capsys.readouterr().err


def test_each_group_is_a_module() -> None:
    folder = ROOT / "kernels" / "bench"
    assert all((folder / f"{name.rpartition('.')[2]}.py").is_file() for name in GROUPS.values())


@needs_no_gpu
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "kernels", "--only", "decode"]) == 1
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith("error: this bench needs a CUDA device, and torch ")
    assert len(written.err.splitlines()) == 1


@needs_no_gpu
def test_it_runs_without_the_dependencies_of_the_command() -> None:
    """From a checkout, where torch and Triton are all that is installed."""
    program = (
        "import runpy, sys\n"
        "for name in ('cyclopts', 'msgspec', 'rich', 'grpc', 'redis', 'pydantic'):\n"
        "    sys.modules[name] = None\n"
        "sys.argv[0] = 'bench'\n"
        "runpy.run_module('baton.kernels.bench', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, "--only", "decode"],
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=str(ROOT / "typings")),
        check=False,
    )
    assert done.returncode == 1
    assert "needs a CUDA device" in done.stderr
    assert "Traceback" not in done.stderr
