"""The `baton` command: its verbs, and what becomes of errors.

Nothing heavy is imported here: a verb's module is loaded when the verb is called, so that
`baton --help` answers at once.

    exit code   meaning
    0           done, or stopped as asked
    1           an error: it is named on stderr, with what to do
    2           the command line cannot be understood
    3           no router answers
    4           what the command line names is not there: a worker, a lease
    130         interrupted by Ctrl-C, or by a pipe that was closed
"""

import os
import sys
from importlib.metadata import version
from typing import Final, NoReturn

from cyclopts import App, CycloptsError

from baton.common.errors import BatonError

EXIT_ERROR: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 3
EXIT_NOT_THERE: Final = 4
EXIT_INTERRUPTED: Final = 130

_EPILOGUE = (
    "Exit codes: 0 done, 1 error, 2 wrong usage, 3 no router answers, 4 no such worker or lease, "
    "130 interrupted."
)
_EXIT_CODES: Final = {
    "router_unreachable": EXIT_UNREACHABLE,
    "unknown_worker": EXIT_NOT_THERE,
    "unknown_request": EXIT_NOT_THERE,
}


def build_app() -> App:
    """All verbs; `help` stands here so that listing them imports none."""
    app = App(
        name="baton",
        help="Serve language models with prefill and decode on separate workers.",
        help_epilogue=_EPILOGUE,
        help_format="plaintext",
        version=lambda: version("kvbaton"),
        version_flags=["--version"],
        suppress_keyboard_interrupt=False,
    )
    verbs = "baton.cli"
    app.command(f"{verbs}.up:up", name="up", help="Run a whole cluster on this host until Ctrl-C.")
    serve = _group(app, "serve", "Run one process of a cluster.")
    serve.command(f"{verbs}.serve:router", name="router", help="The HTTP and gRPC front.")
    serve.command(f"{verbs}.serve:prefill", name="prefill", help="A worker that reads prompts.")
    serve.command(f"{verbs}.serve:decode", name="decode", help="A worker that writes answers.")
    serve.command(f"{verbs}.serve:unified", name="unified", help="A worker that does both.")
    app.command(
        f"{verbs}.complete:complete", name="complete", help="Continue a text, without a template."
    )
    app.command(f"{verbs}.chat:chat", name="chat", help="Talk to a model, with its chat template.")
    admin = _group(app, "admin", "What a router knows of its cluster.")
    workers = _group(admin, "workers", "The workers of the cluster.")
    workers.command(f"{verbs}.admin:list_workers", name="list", help="All workers.")
    workers.command(f"{verbs}.admin:show_worker", name="show", help="All about one of them.")
    workers.command(
        f"{verbs}.admin:drain_worker", name="drain", help="Move what it runs to the others."
    )
    workers.command(f"{verbs}.admin:resume_worker", name="resume", help="Undo a drain.")
    admin.command(f"{verbs}.admin_leases:leases", name="leases", help="Who pins KV for whom.")
    admin.command(
        f"{verbs}.admin_steps:list_steps", name="steps", help="What a worker's engine did last."
    )
    profile = _group(admin, "profile", "A trace of what a worker's engine does.")
    profile.command(f"{verbs}.admin_profile:start_profile", name="start", help="Of its next steps.")
    profile.command(f"{verbs}.admin_profile:stop_profile", name="stop", help="End it sooner.")
    model = _group(app, "model", "Model folders.")
    model.command(
        f"{verbs}.model:inspect", name="inspect", help="What a model is and what its KV takes."
    )
    bench = _group(app, "bench", "Measure a running cluster, the engine or the kernels.")
    bench.command(
        f"{verbs}.bench:recall", name="recall", help="Whether answers are right, and how soon."
    )
    bench.command(
        f"{verbs}.bench_engine:bench_engine",
        name="engine",
        help="What the engine reaches on this GPU, against its limits and vLLM.",
    )
    bench.command(
        f"{verbs}.bench_kernels:bench_kernels",
        name="kernels",
        help="What the kernels reach on this GPU, against its limits.",
    )
    app.command(f"{verbs}.version:show_version", name="version", help="The versions in use.")
    return app


def _group(parent: App, name: str, text: str) -> App:
    group = App(name=name, help=text, version_flags=[])
    parent.command(group)
    return group


def main() -> NoReturn:
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """The exit code of the command with these arguments; errors are on stderr."""
    try:
        code = build_app()(
            arguments, exit_on_error=False, print_error=False, result_action="return_value"
        )
    except CycloptsError as error:
        return _complain(
            _one_line(str(error)).rstrip(".") + "; --help after a verb lists its flags", EXIT_USAGE
        )
    except BatonError as error:
        return _complain(_one_line(error.message), exit_code_of(error))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read stdout has had enough; what is still buffered must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_INTERRUPTED
    return code if isinstance(code, int) else 0


def exit_code_of(error: BatonError) -> int:
    """3 when nothing answered, so that a script may wait and try again; 4 when it need not."""
    return _EXIT_CODES.get(error.reason, EXIT_ERROR)


def _complain(message: str, code: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code


def _one_line(text: str) -> str:
    return " ".join(text.split())
