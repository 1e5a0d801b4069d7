"""Flags before environment before YAML before defaults, and nothing unknown in any of them."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from baton.common.config import (
    DEFAULT_HTTP_PORT,
    ENV_PREFIX,
    RouterConfig,
    WorkerConfig,
    load,
)
from baton.common.errors import ConfigError


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        monkeypatch.delenv(variable)


def yaml(folder: Path, text: str) -> Path:
    path = folder / "baton.yaml"
    path.write_text(text)
    return path


def test_each_source_gives_way_to_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(RouterConfig, {}).http_port == DEFAULT_HTTP_PORT
    file = yaml(tmp_path, "http_port: 8001\n")
    assert load(RouterConfig, {}, file).http_port == 8001
    monkeypatch.setenv("BATON_HTTP_PORT", "8002")
    assert load(RouterConfig, {}, file).http_port == 8002
    assert load(RouterConfig, {"http_port": 8003}, file).http_port == 8003


def test_sources_complete_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_BLOCK_SIZE", "16")
    config = load(WorkerConfig, {"model": "some/folder"}, yaml(tmp_path, "dtype: float32\n"))
    assert (config.model, config.block_size, config.dtype) == ("some/folder", 16, "float32")
    assert config.transport == "nixl"


def test_a_flag_that_was_not_given_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_CLUSTER", "blue")
    assert load(RouterConfig, {"cluster": None}).cluster == "blue"


def test_one_load_leaves_nothing_for_the_next(tmp_path: Path) -> None:
    assert load(RouterConfig, {}, yaml(tmp_path, "cluster: green\n")).cluster == "green"
    assert load(RouterConfig, {}).cluster == "default"


def test_unknown_flags_are_refused() -> None:
    with pytest.raises(ConfigError, match="htttp_port"):
        load(RouterConfig, {"htttp_port": 8000})


def test_unknown_yaml_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="htttp_port"):
        load(RouterConfig, {}, yaml(tmp_path, "htttp_port: 8000\n"))


def test_unknown_variables_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_HTTTP_PORT", "8000")
    with pytest.raises(ConfigError, match="BATON_HTTTP_PORT"):
        load(RouterConfig, {})


def test_a_variable_of_another_process_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """One environment may hold the settings of routers and workers."""
    monkeypatch.setenv("BATON_NUM_BLOCKS", "64")
    assert load(RouterConfig, {}).http_port == DEFAULT_HTTP_PORT


def test_variables_without_the_prefix_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PORT", "1")
    monkeypatch.setenv("CLUSTER", "theirs")
    config = load(RouterConfig, {})
    assert (config.http_port, config.cluster) == (DEFAULT_HTTP_PORT, "default")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path / "absent.yaml")):
        load(RouterConfig, {}, tmp_path / "absent.yaml")


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(ConfigError, match="model: Field required"):
        load(WorkerConfig, {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("http_port", 65536),
        ("http_port", -1),
        ("request_timeout_s", 0),
        ("max_requests", 0),
        ("grpc_port", "many"),
    ],
)
def test_a_value_out_of_range_is_named_with_the_value(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name) as refused:
        load(RouterConfig, {name: value})
    assert repr(value) in refused.value.message


def test_a_configuration_never_changes() -> None:
    config = load(RouterConfig, {})
    with pytest.raises(ValidationError):
        config.http_port = 1


@pytest.mark.parametrize("kind", [RouterConfig, WorkerConfig])
def test_every_setting_explains_itself(kind: type[RouterConfig] | type[WorkerConfig]) -> None:
    assert [name for name, field in kind.model_fields.items() if not field.description] == []


def test_sizes_for_people_from_every_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "worker.yaml"
    file.write_text("kv_memory: 64M\n")
    assert load(WorkerConfig, {"model": "m"}, file).kv_memory == 64 * 2**20
    monkeypatch.setenv("BATON_KV_MEMORY", "2G")
    assert load(WorkerConfig, {"model": "m"}, file).kv_memory == 2**31
    with pytest.raises(ConfigError, match="no size in bytes"):
        load(WorkerConfig, {"model": "m", "kv_memory": "lots"})
