"""The Python client against a real gRPC front that plays a script."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.fronts import Fronts
from support.ports import free_port
from support.tiny_model import frames, tiny_model

from baton.client import BatonClient, Message, ModelCard, complete
from baton.client.failures import RouterUnreachable, baton_error
from baton.common.errors import (
    BatonError,
    ConfigError,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    NoWorker,
    QueueFull,
    all_errors,
)
from baton.common.grpc_server import GrpcServer
from baton.common.sampling import FinishReason, Mode
from baton.router.grpc_errors import abort_with
from baton.router.grpc_front import InferenceServicer
from baton.router.scripted import Script, ScriptedSource
from baton.router.served_model import ServedModel
from baton.v1 import inference_pb2, inference_pb2_grpc

TEXT = " Hello 🌶 world"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return tiny_model(tmp_path_factory.mktemp("model"))


def fronts_of(model: ServedModel, **fields: Any) -> Fronts:
    return Fronts(model, ScriptedSource(Script(frames=frames(model.tokenizer.raw, TEXT), **fields)))


@asynccontextmanager
async def served(servicer: inference_pb2_grpc.InferenceServiceServicer) -> AsyncIterator[str]:
    """The address of a server with this servicer."""
    server = GrpcServer()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server.server)
    port = server.listen("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@asynccontextmanager
async def connected(fronts: Fronts) -> AsyncIterator[BatonClient]:
    servicer = InferenceServicer(fronts.source, fronts.catalog, fronts.intake)
    async with served(servicer) as address, BatonClient(address) as client:
        yield client


async def test_an_answer_comes_in_chunks_and_ends_with_its_report(model: ServedModel) -> None:
    fronts = fronts_of(model, cached_tokens=2)
    async with connected(fronts) as client:
        chunks = [chunk async for chunk in client.generate("one two", max_tokens=5)]
    assert len(chunks) > 2
    assert "".join(chunk.text for chunk in chunks) == TEXT
    ids = [token for chunk in chunks for token in chunk.token_ids]
    assert ids == model.tokenizer.encode(TEXT, add_special_tokens=False)
    assert [chunk.finish for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    finish = chunks[-1].finish
    assert finish is not None
    assert (finish.reason, finish.mode) == (FinishReason.LENGTH, Mode.DISAGG)
    assert (finish.prefill_worker, finish.decode_worker) == ("prefill-0", "decode-0")
    assert (finish.kv_bytes, finish.transport) == (4096, "scripted")
    assert (finish.ttft_s, finish.tpot_s) == (0.25, 0.01)
    assert finish.cached_tokens == 2
    assert finish.prefill_computed_tokens == finish.prompt_tokens - 2
    assert finish.completion_tokens == len(ids)


async def test_every_kind_of_prompt_and_every_sampling_field_arrive(model: ServedModel) -> None:
    fronts = fronts_of(model)
    async with connected(fronts) as client:
        await client.complete([7, 8, 9], max_tokens=3)
        await client.complete([Message("user", "hi")], max_tokens=3)
        await client.complete(
            "text",
            stop=["zzz"],
            request_id="mine",
            max_tokens=3,
            temperature=0.5,
            top_p=0.25,
            top_k=4,
            min_p=0.125,
            repetition_penalty=1.5,
            presence_penalty=-0.5,
            frequency_penalty=0.5,
            seed=2**63,
            min_tokens=1,
            ignore_eos=True,
            logit_bias={5: -2.0},
            stop_token_ids=[6],
        )
    tokens, chat, text = (stream.spec for stream in fronts.source.streams)
    assert tokens.prompt_tokens == [7, 8, 9]
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert model.tokenizer.decode(chat.prompt_tokens).endswith("assistant\n")
    assert chat.prompt_tokens == model.tokenizer.encode(rendered, add_special_tokens=False)
    assert (text.stop, text.request_id) == (("zzz",), "mine")
    sampling = text.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.25, 4)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.125, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-0.5, 0.5)
    assert (sampling.seed, sampling.min_tokens, sampling.ignore_eos) == (2**63, 1, True)
    assert (sampling.logit_bias, sampling.stop_token_ids) == (((5, -2.0),), (6,))


async def test_what_is_not_given_is_not_sent(model: ServedModel) -> None:
    fronts = fronts_of(model)
    async with connected(fronts) as client:
        await client.complete("text", max_tokens=3, temperature=None)
    assert fronts.source.streams[0].spec.sampling.temperature == 1.0


async def test_models_tokenize_and_detokenize(model: ServedModel) -> None:
    async with connected(fronts_of(model)) as client:
        assert await client.models() == [ModelCard("tiny", 512)]
        ids = await client.tokenize("The quick fox")
        assert ids == model.tokenizer.encode("The quick fox", add_special_tokens=True)
        assert await client.detokenize(ids) == "<s>The quick fox"
        chat = await client.tokenize([Message("user", "hi")])
        assert len(chat) > len(await client.tokenize("hi"))


async def test_closing_the_iterator_cancels_the_request(model: ServedModel) -> None:
    fronts = fronts_of(model, is_endless=True)
    async with connected(fronts) as client:
        chunks = client.generate("endless", max_tokens=5)
        await anext(chunks)
        await chunks.aclose()
        async with asyncio.timeout(5):
            await fronts.source.streams[0].cancelled.wait()


async def test_an_error_keeps_its_class_its_words_and_its_advice(model: ServedModel) -> None:
    async with connected(fronts_of(model)) as client:
        with pytest.raises(InvalidRequest, match="top_p is 7") as refused:
            await client.complete("x", top_p=7)
        assert refused.value.field == "top_p"
        with pytest.raises(ModelNotFound, match="served are tiny"):
            await client.complete("x", model="nobody")
        with pytest.raises(InvalidRequest):
            await client.complete([])
    late = QueueFull("full for now", retry_after_s=2.5)
    async with connected(fronts_of(model, error=late)) as client:
        with pytest.raises(QueueFull, match="full for now") as full:
            await client.complete("x", max_tokens=5)
        assert full.value.retry_after_s == 2.5


async def test_what_cannot_be_sent_is_refused_here(model: ServedModel) -> None:
    async with connected(fronts_of(model)) as client:
        with pytest.raises(InvalidRequest, match="max_tokens is -1"):
            await client.complete("x", max_tokens=-1)
        with pytest.raises(InvalidRequest, match="token id"):
            await client.complete([1, -1])


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
async def test_every_error_of_the_tree_survives_the_way(kind: type[BatonError]) -> None:
    error = kind("what happened") if kind is not BatonError else NoWorker("what happened")

    class Refusing(inference_pb2_grpc.InferenceServiceServicer):
        async def ListModels(
            self,
            request: inference_pb2.ListModelsRequest,
            context: grpc.aio.ServicerContext[Any, Any],
        ) -> inference_pb2.ListModelsResponse:
            await abort_with(context, error)

    async with served(Refusing()) as address, BatonClient(address) as client:
        with pytest.raises(BatonError, match="what happened") as raised:
            await client.models()
    assert type(raised.value) is type(error)


async def test_nobody_at_the_address() -> None:
    async with BatonClient(f"127.0.0.1:{free_port()}") as client:
        with pytest.raises(RouterUnreachable, match="baton up"):
            await client.models()


async def test_a_server_of_another_service() -> None:
    server = GrpcServer()
    port = server.listen("127.0.0.1:0")
    await server.start()
    async with BatonClient(f"127.0.0.1:{port}") as client:
        with pytest.raises(ConfigError, match="does not offer this service"):
            await client.models()
    await server.stop(0)


async def test_an_answer_without_an_end_is_an_error() -> None:
    class Forgetful(inference_pb2_grpc.InferenceServiceServicer):
        async def Generate(
            self, request: inference_pb2.GenerateRequest, context: Any
        ) -> AsyncIterator[inference_pb2.GenerateResponse]:
            yield inference_pb2.GenerateResponse(text="half", token_ids=[1])

    async with served(Forgetful()) as address, BatonClient(address) as client:
        with pytest.raises(InternalError, match="without saying how"):
            await client.complete("x")


def test_codes_without_details_still_find_a_class() -> None:
    def met(code: grpc.StatusCode) -> BatonError:
        empty = grpc.aio.Metadata()
        return baton_error(grpc.aio.AioRpcError(code, empty, empty, "said"), "here")

    assert type(met(grpc.StatusCode.INVALID_ARGUMENT)) is InvalidRequest
    assert type(met(grpc.StatusCode.UNAVAILABLE)) is RouterUnreachable
    assert type(met(grpc.StatusCode.DATA_LOSS)) is InternalError
    for code in grpc.StatusCode:
        assert "said" in met(code).message


async def test_complete_works_without_a_loop(model: ServedModel) -> None:
    fronts = fronts_of(model)
    servicer = InferenceServicer(fronts.source, fronts.catalog, fronts.intake)
    async with served(servicer) as address:
        answer = await asyncio.to_thread(complete, "x", address=address, max_tokens=5)
    assert answer.text == TEXT


def test_the_client_needs_grpc_and_protobuf_alone() -> None:
    heavy = ["pydantic", "torch", "redis", "tokenizers", "yaml", "starlette", "msgspec", "numpy"]
    code = f"import sys, baton.client; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path("/"),
    )
    assert found.stdout.strip() == "[]"
