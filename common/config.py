"""Configuration of each process: flag > `BATON_*` environment > YAML file > default.

The one place that reads the environment. Unknown keys are refused wherever they come from. The
description of a field is the help text of its flag.
"""

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from baton.common.errors import ConfigError
from baton.common.sizes import parse_bytes

ENV_PREFIX = "BATON_"
DEFAULT_HTTP_PORT = 8000
DEFAULT_GRPC_PORT = 50051
DEFAULT_ADMIN_PORT = 50052
LOOPBACK = "127.0.0.1"


class _Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    # Set for the duration of `load` only: pydantic-settings asks the class for its sources.
    _yaml_file: ClassVar[Path | None] = None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        sources: list[PydanticBaseSettingsSource] = [init_settings, env_settings]
        if cls._yaml_file is not None:
            sources.append(YamlConfigSettingsSource(settings_cls, yaml_file=cls._yaml_file))
        return tuple(sources)


class ClusterConfig(_Settings):
    """What every process of a cluster shares."""

    cluster: str = Field("default", description="name of the cluster: prefix of its Redis keys")
    redis: str = Field("redis://127.0.0.1:6379/0", description="URL of the Redis server")
    insecure: bool = Field(
        False, description="allow listening beyond loopback without TLS (private networks only)"
    )
    time_scale: float = Field(
        1.0, gt=0, description="multiplies every time-out of the protocol (tests)"
    )
    failpoints: str | None = Field(
        None, description="folder of armed failpoints (tests of faults; never in production)"
    )
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR")


class RouterConfig(ClusterConfig):
    """`baton serve router`."""

    host: str = Field(LOOPBACK, description="address to listen on")
    http_port: int = Field(DEFAULT_HTTP_PORT, ge=0, le=65535, description="OpenAI HTTP API")
    grpc_port: int = Field(DEFAULT_GRPC_PORT, ge=0, le=65535, description="InferenceService")
    admin_port: int = Field(DEFAULT_ADMIN_PORT, ge=0, le=65535, description="AdminService")
    model: str | None = Field(
        None, description="folder with tokenizer and templates; default: as the workers say"
    )
    request_timeout_s: float = Field(
        600.0, gt=0, description="deadline of a request that brings none"
    )
    max_requests: int = Field(1024, ge=1, description="requests in flight before 503")


def _bytes(value: object) -> object:
    return parse_bytes(value) if isinstance(value, str) else value


class WorkerConfig(ClusterConfig):
    """`baton serve prefill|decode|unified`."""

    model: str = Field(description="Hugging Face folder, or ORG/NAME from the hub")
    revision: str | None = Field(None, description="revision of ORG/NAME on the hub")
    served_model_name: str | None = Field(None, description="name that clients send")
    worker_id: str | None = Field(None, description="stable name; default: role and pid")
    listen: str = Field(f"{LOOPBACK}:0", description="HOST:PORT to listen on; port 0: any")
    advertise: str | None = Field(None, description="HOST:PORT that others dial, if not listen's")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="auto, float32, float16 or bfloat16"
    )
    block_size: int = Field(32, ge=1, le=1024, description="tokens per KV block")
    kv_memory: Annotated[int, BeforeValidator(_bytes)] | None = Field(
        None,
        gt=0,
        description="bytes of KV arena; default: 256M on a CPU, what is left on a GPU",
    )
    num_blocks: int | None = Field(None, gt=0, description="KV blocks, instead of --kv-memory")
    max_model_len: int | None = Field(None, gt=0, description="longest prompt plus output")
    max_num_seqs: int = Field(256, ge=1, description="sequences in one step")
    max_num_batched_tokens: int = Field(2048, ge=1, description="prompt tokens in one step")
    max_requests: int = Field(4096, ge=1, description="requests held before they are refused")
    load_format: Literal["auto", "dummy"] = Field(
        "auto", description="auto, or dummy for seeded random weights"
    )
    num_threads: int | None = Field(None, ge=1, description="torch threads")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto (a GPU where there is one), cpu, cuda or cuda:N",
    )
    gpu_memory_share: float = Field(
        1.0, gt=0, le=1, description="of the GPU's memory, for workers that share it"
    )
    cuda_graphs: bool = Field(True, description="replay decode steps as CUDA graphs")
    kv_digest: bool = Field(
        False, description="digest every KV block, to find flipped bits as well as reused slots"
    )
    transport: str = Field("nixl", description="how KV crosses: nixl")
    profile_dir: str | None = Field(
        None,
        description="folder for the traces of `baton admin profile`; default: a fresh one where "
        "temporary files go",
    )
    check_invariants: bool = Field(
        False, description="check the conservation of KV slots after every step (slow)"
    )


_T = TypeVar("_T", bound=_Settings)


def load(kind: type[_T], flags: dict[str, Any], yaml_file: Path | None = None) -> _T:
    """The configuration from all sources; `flags` that are None were not given.

    Raises ConfigError naming the key, the value and what is allowed.
    """
    if yaml_file is not None and not yaml_file.is_file():
        raise ConfigError(f"no configuration file at {yaml_file}")
    _refuse_unknown_environment()
    kind._yaml_file = yaml_file
    try:
        return kind(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error
    finally:
        kind._yaml_file = None


def _refuse_unknown_environment() -> None:
    known = {name.upper() for kind in (RouterConfig, WorkerConfig) for name in kind.model_fields}
    for variable in os.environ:
        if variable.startswith(ENV_PREFIX) and variable[len(ENV_PREFIX) :] not in known:
            raise ConfigError(
                f"the environment has {variable}, which is no setting of Baton; unset it"
            )


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        given = "" if problem["type"] == "missing" else f" (given: {problem['input']!r})"
        lines.append(f"{name}: {problem['msg']}{given}")
    return "; ".join(lines)
