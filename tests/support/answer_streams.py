"""Clients of either front that read as slowly as a test says, and hang up when it says so."""

import asyncio
import json
import socket
from typing import Protocol, Self

import grpc
from support.cluster import Cluster

from baton.v1 import common_pb2, inference_pb2, inference_pb2_grpc

# Of a client's own buffers: so little that a client that does not read is soon noticed.
SMALL_BUFFER_BYTES = 4096
# gRPC's windows hold 64 KiB of what nobody reads, unless it is told otherwise.
_SMALL_WINDOWS = [
    ("grpc.http2.lookahead_bytes", SMALL_BUFFER_BYTES),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


class AnswerStream(Protocol):
    """An answer in progress."""

    async def read(self) -> bytes | None:
        """The next piece, whatever is in it; None at the end or after an error of the server."""
        ...

    async def hang_up(self) -> None:
        """Go away without a word; idempotent."""
        ...


class GrpcAnswer:
    """`baton.v1.InferenceService/Generate` on a channel of its own."""

    def __init__(self, address: str, request: inference_pb2.GenerateRequest) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=_SMALL_WINDOWS)
        self._call = inference_pb2_grpc.InferenceServiceStub(self._channel).Generate(request)
        self.status: grpc.StatusCode | None = None

    @classmethod
    async def open(cls, cluster: Cluster, prompt: list[int], max_tokens: int) -> Self:
        request = inference_pb2.GenerateRequest(
            model=cluster.router.catalog.models()[0].name,
            tokens=inference_pb2.TokenIds(ids=prompt),
            sampling=common_pb2.SamplingParams(
                max_tokens=max_tokens, temperature=0, ignore_eos=True
            ),
        )
        answer = cls(f"127.0.0.1:{cluster.router.grpc_port}", request)
        await answer._channel.channel_ready()
        return answer

    async def read(self) -> bytes | None:
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            self.status = error.code()
            return None
        return response.SerializeToString() if response is not grpc.aio.EOF else None

    async def hang_up(self) -> None:
        self._call.cancel()
        await self._channel.close()


class HttpAnswer:
    """`/v1/completions` as a stream of events, on a connection of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, cluster: Cluster, prompt: list[int], max_tokens: int) -> Self:
        endpoint = socket.socket()
        endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
        endpoint.setblocking(False)
        await asyncio.get_running_loop().sock_connect(
            endpoint, ("127.0.0.1", cluster.router.http_port)
        )
        reader, writer = await asyncio.open_connection(sock=endpoint, limit=SMALL_BUFFER_BYTES)
        body = json.dumps(
            {
                "model": cluster.router.catalog.models()[0].name,
                "prompt": prompt,
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
        ).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: baton\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        return cls(reader, writer)

    async def read(self) -> bytes | None:
        try:
            return await self._reader.read(SMALL_BUFFER_BYTES) or None
        except ConnectionError:
            return None

    async def hang_up(self) -> None:
        self._writer.transport.abort()


FRONTS: dict[str, type[GrpcAnswer] | type[HttpAnswer]] = {"grpc": GrpcAnswer, "http": HttpAnswer}
