"""Clients as people have them, against a live cluster: openai-python, raw HTTP, gRPC stubs."""

from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
from openai import AsyncOpenAI
from support.cluster import Cluster, run_cluster

from baton.v1 import common_pb2, inference_pb2, inference_pb2_grpc

MULTI_BYTE = "Grüße aus Köln, 東京 and 🌶🌶 — ก็ดี"


def http_url(cluster: Cluster) -> str:
    return f"http://127.0.0.1:{cluster.router.http_port}"


def openai_client(cluster: Cluster) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=http_url(cluster) + "/v1", api_key="unused", max_retries=0)


async def test_openai_client_streams_and_completes(tiny_llama: Path, redis_url: str) -> None:
    async with run_cluster(tiny_llama, redis_url) as cluster, openai_client(cluster) as client:
        model = (await client.models.list()).data[0].id
        whole = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": MULTI_BYTE}],
            max_tokens=48,
            temperature=0,
        )
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": MULTI_BYTE}],
            max_tokens=48,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        text, usage = "", None
        async for chunk in stream:
            if chunk.choices:
                text += chunk.choices[0].delta.content or ""
            usage = chunk.usage or usage
        assert whole.choices[0].message.content == text
        assert whole.usage is not None
        assert usage is not None
        assert usage.prompt_tokens == whole.usage.prompt_tokens
        assert usage.completion_tokens == whole.usage.completion_tokens
        # The second request found the first one's blocks.
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == (usage.prompt_tokens - 1) // 32 * 32
        raw = await client.completions.create(
            model=model, prompt=MULTI_BYTE, max_tokens=8, temperature=0, seed=1
        )
        assert raw.usage is not None
        assert raw.usage.completion_tokens <= 8
        assert raw.choices[0].finish_reason in ("stop", "length")
        await cluster.expect_rest()


async def test_grpc_generate_reports_what_happened(tiny_llama: Path, redis_url: str) -> None:
    async with run_cluster(tiny_llama, redis_url) as cluster:
        address = f"127.0.0.1:{cluster.router.grpc_port}"
        async with grpc.aio.insecure_channel(address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            request = inference_pb2.GenerateRequest(
                text=MULTI_BYTE * 3,
                sampling=common_pb2.SamplingParams(max_tokens=24, temperature=0, ignore_eos=True),
            )
            responses = [response async for response in stub.Generate(request)]
            models = await stub.ListModels(inference_pb2.ListModelsRequest())
            token_ids = [token for response in responses for token in response.token_ids]
            text = await stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=token_ids))
    finish = responses[-1].finish
    assert len(token_ids) == finish.usage.completion_tokens == 24
    assert "".join(response.text for response in responses) == text.text
    assert finish.reason == common_pb2.FINISH_REASON_LENGTH
    assert finish.report.mode == common_pb2.MODE_DISAGG
    assert finish.report.kv_bytes > 0
    assert finish.report.decode_forwarded_tokens == 23
    assert finish.report.prefill_worker.startswith("p0@")
    assert finish.report.decode_worker.startswith("d0@")
    assert [model.name for model in models.models] == [tiny_llama.name]


async def test_a_request_without_max_tokens_fits_the_arena(
    tiny_llama: Path, redis_url: str
) -> None:
    async with (
        run_cluster(tiny_llama, redis_url, num_blocks=4) as cluster,
        httpx2.AsyncClient(base_url=http_url(cluster), timeout=30) as client,
    ):
        body = {"prompt": [9] * 40, "ignore_eos": True}
        answer = (await client.post("/v1/completions", json=body)).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 4 * 32 - 40 + 1
        await cluster.expect_rest()


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}

BAD_BODIES: list[tuple[str, Any, int, str | None]] = [
    ("/v1/chat/completions", {**CHAT, "messages": []}, 400, None),
    ("/v1/completions", {"prompt": "", "max_tokens": 4}, 400, None),
    ("/v1/completions", {"prompt": [], "max_tokens": 4}, 400, None),
    ("/v1/completions", {"prompt": [5, 10**9], "max_tokens": 4}, 400, None),
    ("/v1/completions", {"prompt": [5, -1], "max_tokens": 4}, 400, None),
    ("/v1/completions", {"prompt": "word " * 3000}, 400, "context_length_exceeded"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 5000}, 400, "context_length_exceeded"),
    ("/v1/completions", {"prompt": [7] * 500, "max_tokens": 8}, 400, "exceeds_kv_capacity"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, None),
    ("/v1/completions", {"prompt": "a", "max_tokens": -3}, 400, None),
    ("/v1/completions", {"prompt": "a", "max_tokens": 2**63}, 400, None),
    ("/v1/completions", {"prompt": "a", "temperature": -0.1}, 400, None),
    ("/v1/completions", {"prompt": "a", "temperature": 1e30}, 400, None),
    ("/v1/completions", {"prompt": "a", "top_p": 0}, 400, None),
    ("/v1/completions", {"prompt": "a", "top_p": 1.01}, 400, None),
    ("/v1/completions", {"prompt": "a", "top_k": -7}, 400, None),
    ("/v1/completions", {"prompt": "a", "presence_penalty": 9}, 400, None),
    ("/v1/completions", {"prompt": "a", "stop": [""]}, 400, None),
    ("/v1/completions", {"prompt": "a", "stop": ["x"] * 17}, 400, None),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"99999999": 1}}, 400, None),
    ("/v1/completions", {"prompt": "a", "n": 0}, 400, None),
    ("/v1/completions", {"prompt": "a", "kv_transfer_params": {"remote_host": "x"}}, 400, None),
    ("/v1/chat/completions", {**CHAT, "model": "no-such-model"}, 404, "model_not_found"),
    ("/v1/chat/completions", b'{"messages": [', 400, None),
    ("/v1/chat/completions", b'{"messages": NaN}', 400, None),
    ("/v1/chat/completions", b"\xff\xfe", 400, None),
    ("/v1/completions", b'{"prompt": "\\ud800", "max_tokens": 4}', 400, None),
]


async def test_bad_http_input_costs_a_clear_error_and_nothing_else(
    tiny_llama: Path, redis_url: str
) -> None:
    async with (
        run_cluster(tiny_llama, redis_url, num_blocks=15) as cluster,
        httpx2.AsyncClient(base_url=http_url(cluster)) as client,
    ):
        for path, body, status, code in BAD_BODIES:
            headers = {"content-type": "application/json"}
            if isinstance(body, bytes):
                response = await client.post(path, content=body, headers=headers)
            else:
                response = await client.post(path, json=body)
            error = response.json()["error"]
            assert response.status_code == status, (body, error)
            assert error["message"], body
            if code is not None:
                assert error["code"] == code, (body, error)
            assert "hello" not in error["message"], "an error never echoes the prompt"
        await cluster.expect_rest()
        for worker in cluster.workers:
            assert worker.engine.runner.tokens_forwarded == 0, "a bad request reached a model"
        good = await client.post("/v1/chat/completions", json=CHAT)
        assert good.status_code == 200
        assert (await client.get("/ready")).status_code == 200


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (inference_pb2.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT),
        (inference_pb2.GenerateRequest(text=""), grpc.StatusCode.INVALID_ARGUMENT),
        (inference_pb2.GenerateRequest(text="a", model="nope"), grpc.StatusCode.NOT_FOUND),
        (
            inference_pb2.GenerateRequest(tokens=inference_pb2.TokenIds(ids=[2**31])),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (
            inference_pb2.GenerateRequest(
                text="a", sampling=common_pb2.SamplingParams(temperature=float("nan"))
            ),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (
            inference_pb2.GenerateRequest(
                tokens=inference_pb2.TokenIds(ids=[7] * 500),
                sampling=common_pb2.SamplingParams(max_tokens=8),
            ),
            grpc.StatusCode.FAILED_PRECONDITION,
        ),
        (b"\xff\xff\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_bad_grpc_input_costs_a_clear_error_and_nothing_else(
    request_: Any, code: grpc.StatusCode, tiny_llama: Path, redis_url: str
) -> None:
    async with run_cluster(tiny_llama, redis_url, num_blocks=15) as cluster:
        address = f"127.0.0.1:{cluster.router.grpc_port}"
        async with grpc.aio.insecure_channel(address) as channel:
            call = channel.unary_stream(
                "/baton.v1.InferenceService/Generate",
                request_serializer=lambda message: (
                    message if isinstance(message, bytes) else message.SerializeToString()
                ),
                response_deserializer=inference_pb2.GenerateResponse.FromString,
            )(request_)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await anext(aiter(call))
        assert refused.value.code() is code
        assert refused.value.details()
        await cluster.expect_rest()
        assert len((await cluster.generate([7, 8, 9], max_tokens=4)).tokens) == 4
