"""`python -m baton.engine.bench`: `baton bench engine` where only the engine's needs are installed.

From a checkout: PYTHONPATH=typings python -m baton.engine.bench --out figures.json
"""

import argparse
import sys
from pathlib import Path

from baton.common.errors import BatonError
from baton.engine.bench.runner import GROUPS, run_groups
from baton.kernels.bench.figures import missed, plain_table, shown
from baton.kernels.bench.runner import chosen_groups, start_report


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    try:
        return _bench(options)
    except BatonError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return 1


def _bench(options: argparse.Namespace) -> int:
    names = chosen_groups(options.only, GROUPS)
    report = start_report(commit=options.commit)
    try:
        for figure in run_groups(report, names, _say):
            _say(f"  {figure.name}: {shown(figure.achieved, figure.unit)}")
            if options.out is not None:
                report.write(options.out)
    finally:
        # A group that fails takes none of the figures before it along.
        sys.stdout.write(plain_table(report.figures))
    return 1 if options.strict and missed(report.figures) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m baton.engine.bench", description=__doc__)
    parser.add_argument("--only", default="", help=f"some of {','.join(GROUPS)}")
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    parser.add_argument("--commit", default="", help="of the code, where there is no git")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")
    return parser


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
