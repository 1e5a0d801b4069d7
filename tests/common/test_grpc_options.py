"""An option that gRPC does not know is ignored in silence: each name must stand in its library."""

from pathlib import Path

import pytest
from grpc._cython import cygrpc

from baton.common.grpc_options import channel_options, server_options

NAMES = sorted({name for name, _ in [*channel_options(), *server_options()]})


@pytest.fixture(scope="module")
def library() -> bytes:
    return Path(cygrpc.__file__).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_grpc_knows_the_option(name: str, library: bytes) -> None:
    assert name.encode() in library
