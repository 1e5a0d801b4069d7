"""The `baton` command: help, errors and exit codes, and where a setting comes from."""

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.command import baton
from support.ports import free_port

from baton.cli.cluster import to_arguments
from baton.cli.config_flags import with_flags
from baton.cli.main import run
from baton.cli.model_folder import resolve_model
from baton.cli.up import make_plan
from baton.common.config import RouterConfig, WorkerConfig, load
from baton.common.errors import ConfigError, ModelError
from baton.common.sizes import parse_bytes

HELP_LIMIT_S = 0.3
HEAVY = ("pydantic", "grpc", "torch", "redis", "uvloop", "asyncio", "tokenizers", "starlette")


def one_error_line(stderr: str) -> str:
    assert "Traceback" not in stderr
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_help_answers_at_once() -> None:
    """Counted in processor time, which other work on the machine does not stretch."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = baton("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert shown.returncode == 0
        for verb in ("up", "serve", "complete", "chat", "admin", "model", "version"):
            assert f" {verb} " in shown.stdout
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    assert min(seconds() for _ in range(5)) < HELP_LIMIT_S


def test_help_loads_nothing_heavy() -> None:
    timed = baton("--help", PYTHONPROFILEIMPORTTIME="1")
    imported = {line.rpartition("|")[2].strip() for line in timed.stderr.splitlines()}
    assert "cyclopts" in imported
    assert imported.isdisjoint(HEAVY)


def test_each_verb_explains_itself() -> None:
    for verb, flags in {
        ("up",): ("--prefill", "--decode", "--unified", "--http-port", "--admin-port", "--redis"),
        ("up", "--decode", "2"): ("--max-model-len", "--served-model-name", "--kv-memory"),
        ("serve", "router"): ("--config", "--ready-file", "--request-timeout-s"),
        ("serve", "prefill"): ("--max-num-batched-tokens", "--num-blocks", "--dtype"),
        ("serve", "decode"): ("--max-num-seqs", "--block-size", "--transport", "--load-format"),
        ("serve", "unified"): ("--max-num-batched-tokens", "--max-num-seqs", "--num-blocks"),
        ("complete",): ("--max-tokens", "--temperature", "--top-p", "--seed", "--stop", "--json"),
        ("chat",): ("--router", "--system"),
        ("admin", "workers", "list"): ("--admin", "--json"),
        ("admin", "leases"): ("--admin", "--json"),
        ("model", "inspect"): ("--kv-memory", "--json"),
        ("version",): ("--json",),
    }.items():
        shown = baton(*verb, "--help")
        assert shown.returncode == 0, shown.stderr
        assert all(f"{flag} " in shown.stdout for flag in flags), shown.stdout


def test_version_as_json() -> None:
    shown = baton("version", "--json")
    found = json.loads(shown.stdout)
    assert found["baton"] == "0.1.0"
    assert {"python", "grpcio"} <= found.keys()


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["complete"],
        ["complete", "x", "--max-tokens", "many"],
        ["serve", "router", "--no-such-flag", "1"],
        ["up", "--prefill"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    one_error_line(capsys.readouterr().err)


def test_nobody_listens_is_exit_code_3() -> None:
    at = f"127.0.0.1:{free_port()}"
    for arguments in (["complete", "x", "--router", at], ["admin", "leases", "--admin", at]):
        failed = baton(*arguments)
        assert failed.returncode == 3
        assert at in one_error_line(failed.stderr)
        assert failed.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "router", "--http-port", "70000"], "http_port"),
        (["serve", "router", "--log-level", "loud"], "loud"),
        (["serve", "router", "--config", "/no/such.yaml"], "/no/such.yaml"),
        (["serve", "prefill", "--kv-memory", "lots"], "lots"),
        (["serve", "decode"], "model"),
        (["up", "/no/such/model"], "/no/such/model"),
        (["up", ".", "--prefill", "0"], "--prefill 0 --decode 1 --unified 0"),
        (["up", ".", "--unified", "-1"], "--unified -1"),
        (["up", ".", "--unified", "1", "--decode", "0"], "--decode 0"),
        (["model", "inspect", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_an_error_is_one_line_and_exit_code_1(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 1
    assert said in one_error_line(capsys.readouterr().err)


def test_without_redis_a_process_says_so() -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    failed = baton("serve", "router", "--http-port=0", "--grpc-port=0", "--redis", url)
    assert failed.returncode == 1
    assert "--redis URL" in one_error_line(failed.stderr)


def test_an_unknown_variable_is_refused() -> None:
    failed = baton("serve", "router", BATON_HTP_PORT="1")
    assert failed.returncode == 1
    assert "BATON_HTP_PORT" in one_error_line(failed.stderr)


def given_flags(arguments: list[str]) -> dict[str, Any]:
    """What `with_flags` passes on, read by the real command line."""
    from cyclopts import App

    @with_flags(WorkerConfig)
    def verb(model: str | None = None, /, **flags: Any) -> dict[str, Any]:
        return {"model": model, **flags}

    app = App(result_action="return_value")
    app.default(verb)
    found: dict[str, Any] = app(arguments, exit_on_error=False, print_error=False)
    return found


def test_flag_then_environment_then_yaml_then_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "worker.yaml"
    file.write_text("model: from-yaml\nblock_size: 8\nmax_num_seqs: 8\nnum_threads: 8\n")
    monkeypatch.setenv("BATON_BLOCK_SIZE", "16")
    monkeypatch.setenv("BATON_MAX_NUM_SEQS", "16")
    flags = given_flags(["--block-size", "64", "--kv-memory", "2M", "--check-invariants"])
    config = load(WorkerConfig, flags, file)
    assert (config.block_size, config.max_num_seqs, config.num_threads) == (64, 16, 8)
    assert (config.model, config.dtype) == ("from-yaml", "auto")
    assert (config.kv_memory, config.check_invariants) == (2 * 2**20, True)


def test_an_unknown_key_in_yaml_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    file.write_text("http_prt: 1\n")
    with pytest.raises(ConfigError, match="http_prt"):
        load(RouterConfig, {}, file)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1024", 1024), ("512M", 2**29), ("2G", 2**31), ("1.5GiB", 3 * 2**29), ("64kB", 2**16)],
)
def test_sizes_for_people(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "M", "1X", "-1M", "1 2"])
def test_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="512M"):
        parse_bytes(text)


def test_flags_of_a_child() -> None:
    flags = {"http_port": 0, "insecure": True, "check": False, "model": None, "host": "::1"}
    assert to_arguments(flags) == ["--http-port=0", "--insecure", "--host=::1"]


def test_model_folders(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert resolve_model(str(tiny_llama)) == tiny_llama.resolve()
    monkeypatch.chdir(tiny_llama.parent)
    assert resolve_model("./tiny-llama") == tiny_llama.resolve()
    with pytest.raises(ModelError, match="ORG/NAME"):
        resolve_model(str(tmp_path / "missing"))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ModelError, match="no model folder"):
        resolve_model(str(file))


def test_a_hub_model_without_a_network(tmp_path: Path) -> None:
    failed = baton("model", "inspect", "no-org/no-model", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert failed.returncode == 1
    assert "not in the local cache" in one_error_line(failed.stderr)


def test_inspect_a_model(tiny_llama: Path) -> None:
    shown = baton("model", "inspect", str(tiny_llama), "--kv-memory", "1M", "--json")
    facts = json.loads(shown.stdout)
    # K and V, 2 layers, 2 heads of 16 elements of 4 bytes.
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert facts["kv_bytes_per_block"] == 32 * facts["kv_bytes_per_token"]
    assert facts["num_blocks"] == 2**20 // facts["kv_bytes_per_block"]
    assert facts["num_tokens"] == 32 * facts["num_blocks"]
    # Of 4 bytes each, beside the header.
    weights = (tiny_llama / "model.safetensors").stat().st_size
    assert 0 < weights - 4 * facts["parameters"] < 10_000
    shown = baton("model", "inspect", str(tiny_llama))
    assert "LlamaForCausalLM" in shown.stdout


def test_without_a_model_the_shipped_one_is_inspected() -> None:
    shown = baton("model", "inspect", "--json")
    facts = json.loads(shown.stdout)
    assert Path(facts["folder"]).name == "baton_tiny"
    assert (facts["num_layers"], facts["num_kv_heads"], facts["max_model_len"]) == (6, 4, 4096)


def test_the_shipped_model_is_served_in_float32_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ports = {"http_port": 0, "grpc_port": 0, "admin_port": 0}
    flags = make_plan(None, flags=ports).worker_flags
    assert (flags["dtype"], flags["served_model_name"]) == ("float32", "baton-tiny")
    told = make_plan(None, flags={**ports, "dtype": "bfloat16"}).worker_flags
    assert (told["dtype"], told["served_model_name"]) == ("bfloat16", "baton-tiny")
    monkeypatch.setenv("BATON_SERVED_MODEL_NAME", "mine")
    assert "served_model_name" not in make_plan(None, flags=ports).worker_flags


def test_unified_workers_take_the_place_of_the_pair_unless_it_is_asked_for() -> None:
    def counts(**asked: int) -> tuple[int, int, int]:
        plan = make_plan(None, flags={"http_port": 0, "grpc_port": 0, "admin_port": 0}, **asked)
        return plan.num_prefill, plan.num_decode, plan.num_unified

    assert counts() == (1, 1, 0)
    assert counts(num_unified=2) == (0, 0, 2)
    assert counts(num_unified=2, num_prefill=0, num_decode=0) == (0, 0, 2)
    assert counts(num_unified=1, num_prefill=2) == (2, 1, 1)
    assert counts(num_unified=1, num_decode=3) == (1, 3, 1)


def test_inspect_notices_a_truncated_file(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    assert run(["model", "inspect", str(folder)]) == 1
    assert "model.safetensors" in one_error_line(capsys.readouterr().err)


def test_version_as_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == "0.1.0\n"
