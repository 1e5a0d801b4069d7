"""A run of the groups: which there are, what they say, on which machine. No torch at the top."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from baton.common.errors import ConfigError
from baton.kernels.bench.figures import Figure

if TYPE_CHECKING:
    from baton.kernels.bench.harness import Context

DEFAULT_BUDGET_S: Final = 1.0
UNKNOWN: Final = "unknown"

# Names of --only to modules; each has `measure(context)`, an iterator of figures.
GROUPS: Final = {
    "decode": "baton.kernels.bench.decode_attention",
    "prefill": "baton.kernels.bench.prefill_attention",
    "weights": "baton.kernels.bench.weight_streaming",
    "fused": "baton.kernels.bench.fused",
    "sampling": "baton.kernels.bench.sampling",
    "blocks": "baton.kernels.bench.block_copy",
}


@dataclass(kw_only=True)
class Report:
    """Figures, and what they are figures of."""

    commit: str
    versions: dict[str, str]
    machine: dict[str, Any]
    budget_s: float
    figures: list[Figure] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "figures": [figure.as_json() for figure in self.figures]}

    def write(self, path: Path) -> None:
        """As JSON; ConfigError where that is impossible."""
        text = json.dumps(self.as_json(), indent=2, ensure_ascii=False)
        try:
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--out: {path} cannot be written: {error.strerror}") from error


def chosen_groups(only: str, groups: Mapping[str, str] = GROUPS) -> list[str]:
    """The groups of "decode,prefill", in the order of `groups`; all of them of "". ConfigError."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in groups]
    if unknown:
        raise ConfigError(
            f"--only: there is no group {', '.join(unknown)}; there are {', '.join(groups)}"
        )
    return [name for name in groups if name in names] if names else list(groups)


def start_report(*, budget_s: float = DEFAULT_BUDGET_S, commit: str = "") -> Report:
    """An empty report of this machine; ConfigError without a CUDA device."""
    _require_device()
    return Report(
        commit=commit or _commit_here(),
        versions=_versions(),
        machine=_machine(),
        budget_s=budget_s,
    )


def run_groups(report: Report, names: list[str], say: Callable[[str], None]) -> Iterator[Figure]:
    """Measure, group by group. Each figure is in the report as soon as it is known."""
    import torch

    from baton.kernels.bench.harness import Context

    context = Context(device=torch.device("cuda", 0), budget_s=report.budget_s, say=say)
    torch.cuda.set_device(context.device)
    torch.manual_seed(1)
    report.machine["copy_gb_per_s"] = context.copy_rate / 1e9
    for name in names:
        context.release()
        for figure in _measure(name, context):
            report.figures.append(figure)
            yield figure


def _measure(name: str, context: "Context") -> Iterator[Figure]:
    measured: Iterator[Figure] = import_module(GROUPS[name]).measure(context)
    return measured


def _require_device() -> None:
    """ConfigError unless torch and Triton are here and see a GPU."""
    for package in ("torch", "triton"):
        if find_spec(package) is None:
            raise ConfigError(
                f"this bench needs a CUDA device and {package}, which is not installed; "
                "pip install 'kvbaton[cuda]'"
            )
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            f"this bench needs a CUDA device, and torch {torch.__version__} sees none; "
            "run it on a machine with an NVIDIA GPU and a CUDA build of torch"
        )


def _versions() -> dict[str, str]:
    import torch

    found = {"torch": torch.__version__, "cuda": torch.version.cuda or UNKNOWN}
    found["cudnn"] = str(torch.backends.cudnn.version())
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        found["triton"] = UNKNOWN
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found["driver"] = _first_line(query)
    return found


def _machine() -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "count": torch.cuda.device_count(),
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
    }


def _commit_here() -> str:
    """The checkout's commit, with -dirty after changes; unknown where Baton was installed."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    if _first_line([*git, "ls-files", here.name]) != here.name:
        return UNKNOWN
    return _first_line([*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])


def _first_line(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return UNKNOWN
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else UNKNOWN
