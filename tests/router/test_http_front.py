"""OpenAI's HTTP API, by raw requests and by OpenAI's own client."""

import asyncio
import json
from typing import Any

import httpx2
import openai
import pytest
from support.http_clients import (
    CHAT,
    COMPLETIONS,
    TEXT,
    chat_body,
    events,
    fronts_of,
    in_process,
    openai_client,
    script_of,
)
from support.tiny_model import tiny_model

from baton.common.sampling import FinishReason
from baton.router.http_front import build_app
from baton.router.scripted import Script
from baton.router.served_model import ServedModel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return tiny_model(tmp_path_factory.mktemp("model"), name="org/tiny")


# --- answers ---


async def test_openai_chat(model: ServedModel) -> None:
    fronts = fronts_of(model, script_of(model, cached_tokens=2))
    async with openai_client(fronts) as client:
        answer = await client.chat.completions.create(
            model="org/tiny", messages=[{"role": "user", "content": "Hi"}], temperature=0, seed=4
        )
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == "org/tiny"
    assert answer.created == 1000
    spec = fronts.source.streams[0].spec
    assert (spec.sampling.temperature, spec.sampling.seed, spec.timeout_s) == (0, 4, 9.0)
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens == len(spec.prompt_tokens)
    assert usage.completion_tokens == len(model.tokenizer.encode(TEXT, add_special_tokens=False))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 2
    assert answer.model_extra is not None
    report = answer.model_extra["baton"]
    assert (report["mode"], report["prefill_worker"], report["kv_bytes"]) == (
        "disagg",
        "prefill-0",
        4096,
    )
    assert report["request_id"] == spec.request_id
    assert answer.id == f"chatcmpl-{spec.request_id}"


@pytest.mark.parametrize("include_usage", [True, False])
async def test_openai_chat_stream(model: ServedModel, include_usage: bool) -> None:
    options: Any = {"stream_options": {"include_usage": True}} if include_usage else {}
    async with openai_client(fronts_of(model)) as client:
        stream = await client.chat.completions.create(
            model="org/tiny", messages=[{"role": "user", "content": "Hi"}], stream=True, **options
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(not chunk.choices or not chunk.choices[0].delta.role for chunk in chunks[1:])
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == TEXT
    assert sum(map(bool, texts)) > 5
    with_choice = [chunk for chunk in chunks if chunk.choices]
    assert [c.choices[0].finish_reason for c in with_choice[-2:]] == [None, "length"]
    assert len(chunks) - len(with_choice) == int(include_usage)
    assert all(chunk.usage is None for chunk in with_choice)
    assert (chunks[-1].usage is not None) == include_usage
    assert all("baton" not in (chunk.model_extra or {}) for chunk in chunks[:-1])
    assert (chunks[-1].model_extra or {})["baton"]["mode"] == "disagg"


async def test_openai_completion_whole_and_streamed(model: ServedModel) -> None:
    async with openai_client(fronts_of(model)) as client:
        answer = await client.completions.create(model="org/tiny", prompt="Hi", max_tokens=99)
        stream = await client.completions.create(model="org/tiny", prompt="Hi", stream=True)
        chunks = [chunk async for chunk in stream]
    assert answer.choices[0].text == TEXT
    assert answer.object == chunks[0].object == "text_completion"
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT
    assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason == "length"


async def test_the_stream_on_the_wire(model: ServedModel) -> None:
    body = chat_body(stream=True, stream_options={"include_usage": True})
    async with in_process(fronts_of(model)) as client:
        response = await client.post(CHAT, json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    first, *middle, usage, done = events(response)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert done == "data: [DONE]"
    assert usage["choices"] == []
    assert set(usage["usage"]) >= {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert all(chunk["usage"] is None for chunk in [first, *middle])
    assert {chunk["object"] for chunk in [first, *middle, usage]} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in [first, *middle, usage]}) == 1


@pytest.mark.parametrize("prompt", ["Hi", ["Hi"], "ids", ["ids"]])
async def test_forms_of_a_prompt(model: ServedModel, prompt: Any) -> None:
    ids = model.tokenizer.encode("Hi", add_special_tokens=True)
    sent = {"ids": ids}.get(prompt, prompt) if isinstance(prompt, str) else prompt
    sent = [ids] if sent == ["ids"] else sent
    fronts = fronts_of(model)
    async with in_process(fronts) as client:
        response = await client.post(COMPLETIONS, json={"prompt": sent})
    assert response.status_code == 200
    assert fronts.source.streams[0].spec.prompt_tokens == ids


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_stop_string_ends_the_request_on_its_workers(
    model: ServedModel, is_stream: bool
) -> None:
    fronts = fronts_of(model)
    body = chat_body(stop=["END"], stream=is_stream)
    async with in_process(fronts) as client:
        response = await client.post(CHAT, json=body)
    if is_stream:
        *chunks, last, _ = events(response)
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in [*chunks, last])
        finish, report = last["choices"][0]["finish_reason"], last["baton"]
    else:
        answer = response.json()
        text = answer["choices"][0]["message"]["content"]
        finish, report = answer["choices"][0]["finish_reason"], answer["baton"]
        tokens = model.tokenizer.encode(TEXT, add_special_tokens=False)
        until = model.tokenizer.decode(tokens[: answer["usage"]["completion_tokens"]])
        assert until.endswith("END")
    assert text == " Hello 🌶 world "
    assert finish == "stop"
    assert report["mode"] == "disagg"
    stream = fronts.source.streams[0]
    assert stream.is_finished_early
    assert not stream.is_cancelled


async def test_a_stop_string_in_the_last_frame_is_a_stop(model: ServedModel) -> None:
    async with in_process(fronts_of(model, script_of(model, "a END"))) as client:
        response = await client.post(COMPLETIONS, json={"prompt": "x", "stop": "END"})
    choice = response.json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("a ", "stop")


async def test_half_a_stop_string_is_text(model: ServedModel) -> None:
    async with in_process(fronts_of(model, script_of(model, "a EN"))) as client:
        response = await client.post(COMPLETIONS, json={"prompt": "x", "stop": "END"})
    choice = response.json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("a EN", "length")


async def test_the_token_that_ends_an_answer_has_no_text(model: ServedModel) -> None:
    ids = model.tokenizer.encode(" one two", add_special_tokens=False)
    script = Script(frames=[ids], finish=FinishReason.STOP)
    body = {"prompt": "x", "stop_token_ids": [ids[-1]]}
    async with in_process(fronts_of(model, script)) as client:
        choice = (await client.post(COMPLETIONS, json=body)).json()["choices"][0]
    assert choice["text"] == model.tokenizer.decode(ids[:-1])


# --- hanging up ---


@pytest.mark.parametrize("is_stream", [True, False])
async def test_hanging_up_cancels_the_request(model: ServedModel, is_stream: bool) -> None:
    fronts = fronts_of(model, script_of(model, is_endless=True), script_of(model))
    body = json.dumps(chat_body(stream=is_stream)).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    async with fronts.http() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + body)
        if is_stream:
            await reader.readuntil(b"world")
        else:
            # A second request is answered behind the first, so that one has been submitted.
            async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                await client.get("/live")
                while not fronts.source.streams:
                    await client.get("/live")
        writer.close()
        await writer.wait_closed()
        async with asyncio.timeout(10):
            await fronts.source.streams[0].cancelled.wait()


# --- pages ---


async def test_models(model: ServedModel) -> None:
    async with openai_client(fronts_of(model)) as client:
        listed = [one async for one in client.models.list()]
        assert [one.id for one in listed] == ["org/tiny"]
        one = await client.models.retrieve("org/tiny")
        assert (one.id, one.owned_by, (one.model_extra or {})["max_model_len"]) == (
            "org/tiny",
            "baton",
            512,
        )
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("nope")


async def test_health_follows_the_cluster(model: ServedModel) -> None:
    fronts = fronts_of(model)
    async with in_process(fronts) as client:
        paths = ("/health", "/ready", "/live", "/version")
        assert [(await client.get(path)).status_code for path in paths] == [200] * 4
        fronts.catalog.set_ready(False)
        assert [(await client.get(path)).status_code for path in paths] == [503, 503, 200, 200]


def test_the_front_needs_no_clock_to_be_built(model: ServedModel) -> None:
    fronts = fronts_of(model)
    assert build_app(fronts.source, fronts.catalog, fronts.intake).routes
