"""`baton.v1.InferenceService` on a real server, with rich errors."""

import asyncio
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from support.fronts import Fronts
from support.reading import read_into
from support.tiny_model import frames, tiny_model

from baton.common.errors import BatonError, NoWorker, TransferTimeout, all_errors
from baton.common.status import status_of
from baton.router.grpc_errors import rich_status
from baton.router.scripted import Script, ScriptedSource
from baton.router.served_model import ServedModel
from baton.v1 import common_pb2, inference_pb2

TEXT = " Hello 🌶 world END and more"

GenerateRequest = inference_pb2.GenerateRequest
SamplingParams = common_pb2.SamplingParams


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return tiny_model(tmp_path_factory.mktemp("model"))


def fronts_of(model: ServedModel, **fields: Any) -> Fronts:
    script = Script(frames=frames(model.tokenizer.raw, TEXT), **fields)
    return Fronts(model, ScriptedSource(script))


def chat(*messages: tuple[str, str]) -> inference_pb2.ChatMessages:
    return inference_pb2.ChatMessages(
        messages=[inference_pb2.ChatMessage(role=role, content=text) for role, text in messages]
    )


def details(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """The error's google.rpc details by the name of their type."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    found: dict[str, Any] = {}
    for wrapper in status.details:
        name = wrapper.TypeName().rpartition(".")[2]
        found[name] = getattr(error_details_pb2, name)()
        assert wrapper.Unpack(found[name])
    return found


async def generate(fronts: Fronts, request: GenerateRequest) -> list[Any]:
    async with fronts.grpc() as stub:
        return [response async for response in stub.Generate(request, timeout=5)]


async def failure(fronts: Fronts, request: GenerateRequest) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(fronts, request)
    return caught.value


@pytest.mark.parametrize("kind", ["text", "tokens", "chat"])
async def test_generate(model: ServedModel, kind: str) -> None:
    ids = model.tokenizer.encode("Hi", add_special_tokens=True)
    prompt: dict[str, Any] = {
        "text": {"text": "Hi"},
        "tokens": {"tokens": inference_pb2.TokenIds(ids=ids)},
        "chat": {"chat": chat(("user", "Hi"))},
    }[kind]
    fronts = fronts_of(model, cached_tokens=1)
    responses = await generate(fronts, GenerateRequest(request_id="r.1", **prompt))
    assert "".join(response.text for response in responses) == TEXT
    assert [token for response in responses for token in response.token_ids] == (
        model.tokenizer.encode(TEXT, add_special_tokens=False)
    )
    assert [response.HasField("finish") for response in responses[:-1]] == [False] * (
        len(responses) - 1
    )
    finish = responses[-1].finish
    spec = fronts.source.streams[0].spec
    assert finish.reason == common_pb2.FINISH_REASON_LENGTH
    assert finish.usage.prompt_tokens == len(spec.prompt_tokens)
    assert finish.usage.cached_tokens == 1
    assert finish.report.request_id == spec.request_id == "r.1"
    assert finish.report.mode == common_pb2.MODE_DISAGG
    assert finish.report.ttft_s == 0.25
    # gRPC's wire format keeps three digits of a deadline and rounds up: seen 5.0086 of 5.
    assert 0 < spec.timeout_s <= 5 + 0.01
    if kind != "chat":
        assert spec.prompt_tokens == ids


async def test_zero_is_not_absent(model: ServedModel) -> None:
    fronts = fronts_of(model)
    zero = SamplingParams(temperature=0, seed=0, logit_bias=[{"token_id": 5, "bias": 1.5}])
    await generate(fronts, GenerateRequest(text="a", sampling=zero))
    sampling = fronts.source.streams[0].spec.sampling
    assert (sampling.temperature, sampling.seed) == (0, 0)
    assert sampling.logit_bias == ((5, 1.5),)
    fronts = fronts_of(model)
    await generate(fronts, GenerateRequest(text="a"))
    sampling = fronts.source.streams[0].spec.sampling
    assert sampling.temperature == 1
    assert sampling.seed != 0


async def test_stop_strings(model: ServedModel) -> None:
    fronts = fronts_of(model)
    responses = await generate(fronts, GenerateRequest(text="a", stop=["END"]))
    assert "".join(response.text for response in responses) == " Hello 🌶 world "
    finish = responses[-1].finish
    assert finish.reason == common_pb2.FINISH_REASON_STOP
    assert finish.usage.completion_tokens == sum(len(one.token_ids) for one in responses)
    assert fronts.source.streams[0].is_finished_early


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "prompt"),
        ({"text": ""}, "prompt"),
        ({"chat": inference_pb2.ChatMessages()}, "messages"),
        ({"chat": chat(("tourist", "x"))}, "messages[0].role"),
        ({"tokens": inference_pb2.TokenIds(ids=[2**32 - 1])}, "prompt"),
        ({"text": "a", "stop": [""]}, "stop"),
        ({"text": "a", "request_id": "a b"}, "request_id"),
        ({"text": "a", "sampling": SamplingParams(max_tokens=0)}, "max_tokens"),
        ({"text": "a", "sampling": SamplingParams(temperature=float("nan"))}, "temperature"),
        ({"text": "a", "sampling": SamplingParams(top_p=float("inf"))}, "top_p"),
    ],
)
async def test_bad_requests_name_their_field(
    model: ServedModel, fields: dict[str, Any], field: str
) -> None:
    fronts = fronts_of(model)
    error = await failure(fronts, GenerateRequest(**fields))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    found = details(error)
    assert [one.field for one in found["BadRequest"].field_violations] == [field]
    assert found["ErrorInfo"].domain == "baton"
    assert not fronts.source.streams


async def test_context_length_has_its_reason(model: ServedModel) -> None:
    request = GenerateRequest(text="a", sampling=SamplingParams(max_tokens=512))
    found = details(await failure(fronts_of(model), request))
    assert found["ErrorInfo"].reason == "context_length_exceeded"


@pytest.mark.parametrize(
    "error", [NoWorker("nobody", retry_after_s=2.5), TransferTimeout("the hand-over took too long")]
)
async def test_errors_in_the_stream(model: ServedModel, error: BatonError) -> None:
    fronts = fronts_of(model, error=error)
    async with fronts.grpc() as stub:
        responses: list[Any] = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_into(responses, stub.Generate(GenerateRequest(text="a")))
    assert "".join(response.text for response in responses) == TEXT
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == error.message
    found = details(caught.value)
    assert found["ErrorInfo"].reason == error.reason
    delay = found["RetryInfo"].retry_delay.ToNanoseconds() / 1e9
    assert delay == (error.retry_after_s or 1.0)


async def test_hanging_up_cancels_the_request(model: ServedModel) -> None:
    fronts = fronts_of(model, is_endless=True)
    async with fronts.grpc() as stub:
        call = stub.Generate(GenerateRequest(text="a"))
        assert await call.read() is not grpc.aio.EOF
        call.cancel()
        async with asyncio.timeout(5):
            await fronts.source.streams[0].cancelled.wait()


async def test_models_tokenize_and_detokenize(model: ServedModel) -> None:
    async with fronts_of(model).grpc() as stub:
        listed = await stub.ListModels(inference_pb2.ListModelsRequest())
        assert [(card.name, card.max_model_len) for card in listed.models] == [("tiny", 512)]
        text = inference_pb2.TokenizeRequest(text="Hello 🌶")
        ids = list((await stub.Tokenize(text)).token_ids)
        assert ids == model.tokenizer.encode("Hello 🌶", add_special_tokens=True)
        chat_ids = await stub.Tokenize(inference_pb2.TokenizeRequest(chat=chat(("user", "x"))))
        back = await stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=chat_ids.token_ids))
        assert back.text == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
        for method, request, code in [
            (stub.Tokenize, inference_pb2.TokenizeRequest(), "INVALID_ARGUMENT"),
            (stub.Tokenize, inference_pb2.TokenizeRequest(model="x", text="a"), "NOT_FOUND"),
            (
                stub.Detokenize,
                inference_pb2.DetokenizeRequest(token_ids=[9999]),
                "INVALID_ARGUMENT",
            ),
        ]:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await method(request)
            assert caught.value.code().name == code


@pytest.mark.parametrize("cls", all_errors(), ids=lambda cls: cls.__name__)
def test_every_error_has_a_rich_status(cls: type[BatonError]) -> None:
    status = rich_status(cls("words", field="f"))
    assert status.code == status_of(cls).grpc.value[0]
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.reason == cls.reason
