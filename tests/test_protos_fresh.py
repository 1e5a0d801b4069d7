"""Generated code is what the protos say, and the protos keep the rules of buf's STANDARD."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from support.house import ROOT

PROTOS = ROOT / "protos"
FILES = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
PASCAL = re.compile(r"([A-Z][a-z0-9]*)+")
SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
# Field numbers of descriptor.proto: where a service and its methods lie in a file.
SERVICE, METHOD = 6, 2


def protoc(*options: str) -> None:
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(PROTOS), *options, *FILES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[FileDescriptorProto]:
    """The parsed protos with their comments."""
    out = tmp_path_factory.mktemp("descriptors") / "all.binpb"
    protoc(f"--descriptor_set_out={out}", "--include_source_info")
    return list(FileDescriptorSet.FromString(out.read_bytes()).file)


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    protoc(f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}", f"--pyi_out={tmp_path}")
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.py*")}
    committed = {
        path.relative_to(PROTOS): path.read_bytes()
        for path in PROTOS.rglob("*_pb2*.py*")
        if path.suffix in (".py", ".pyi")
    }
    assert set(made) == set(committed), "regenerate with `make protos`"
    stale = [str(path) for path in made if made[path] != committed[path]]
    assert stale == [], "regenerate with `make protos`"


def test_a_file_lies_where_its_package_says(files: list[FileDescriptorProto]) -> None:
    for file in files:
        folder, _, name = file.name.rpartition("/")
        assert folder == file.package.replace(".", "/"), file.name
        assert re.fullmatch(r".*\.v[1-9][0-9]*", file.package), f"{file.package} has no version"
        assert SNAKE.fullmatch(name.removesuffix(".proto")), file.name
        assert file.syntax == "proto3", file.name
        assert not file.public_dependency, f"{file.name} imports publicly"


def test_every_import_is_used(files: list[FileDescriptorProto]) -> None:
    defined = {file.name: set(_names(file)) for file in files}
    for file in files:
        used = set(_references(file))
        for dependency in file.dependency:
            assert used & defined[dependency], f"{file.name} does not use {dependency}"


def test_services_and_rpcs_are_named_alike(files: list[FileDescriptorProto]) -> None:
    taken: list[str] = []
    for file in files:
        for service in file.service:
            assert PASCAL.fullmatch(service.name), service.name
            assert service.name.endswith("Service"), service.name
            for rpc in service.method:
                assert PASCAL.fullmatch(rpc.name), rpc.name
                for message, suffix in ((rpc.input_type, "Request"), (rpc.output_type, "Response")):
                    assert message == f".{file.package}.{rpc.name}{suffix}", rpc.name
                    taken.append(message)
    assert len(set(taken)) == len(taken), "two rpcs share a message"


def test_every_rpc_says_what_it_does(files: list[FileDescriptorProto]) -> None:
    for file in files:
        commented = {
            tuple(location.path)
            for location in file.source_code_info.location
            if location.leading_comments.strip()
        }
        for index, service in enumerate(file.service):
            silent = _silent_rpcs(service, index, commented)
            assert silent == [], f"{service.name}: {silent} have no comment"


def test_enums_start_unspecified_and_carry_their_name(files: list[FileDescriptorProto]) -> None:
    for enum in (enum for file in files for enum in _enums(file)):
        assert PASCAL.fullmatch(enum.name), enum.name
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper() + "_"
        assert enum.value[0].name == f"{prefix}UNSPECIFIED", enum.name
        assert enum.value[0].number == 0, enum.name
        assert all(value.name.startswith(prefix) for value in enum.value), enum.name
        assert all(value.name.isupper() for value in enum.value), enum.name
        assert not enum.options.allow_alias, enum.name


def test_messages_and_fields_are_named_alike(files: list[FileDescriptorProto]) -> None:
    for message in (message for file in files for message in _messages(file)):
        assert PASCAL.fullmatch(message.name), message.name
        for named in (*message.field, *message.oneof_decl):
            # An optional field has a oneof of its own, whose name begins with an underscore.
            name = named.name.removeprefix("_")
            assert SNAKE.fullmatch(name), f"{message.name}.{named.name}"


def _silent_rpcs(
    service: ServiceDescriptorProto, index: int, commented: set[tuple[int, ...]]
) -> list[str]:
    return [
        rpc.name
        for position, rpc in enumerate(service.method)
        if (SERVICE, index, METHOD, position) not in commented
    ]


def _messages(file: FileDescriptorProto) -> Iterator[DescriptorProto]:
    waiting = list(file.message_type)
    while waiting:
        message = waiting.pop()
        yield message
        waiting.extend(message.nested_type)


def _enums(file: FileDescriptorProto) -> Iterator[EnumDescriptorProto]:
    yield from file.enum_type
    for message in _messages(file):
        yield from message.enum_type


def _names(file: FileDescriptorProto) -> Iterator[str]:
    for named in (*file.message_type, *file.enum_type):
        yield f".{file.package}.{named.name}"


def _references(file: FileDescriptorProto) -> Iterator[str]:
    for message in _messages(file):
        yield from (field.type_name for field in message.field if field.type_name)
    for service in file.service:
        for rpc in service.method:
            yield from (rpc.input_type, rpc.output_type)
