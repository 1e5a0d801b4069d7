"""What the HTTP front refuses and how, and how it tells of failures."""

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from support.fronts import Fronts
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
from support.reading import read_into
from support.tiny_model import tiny_model

from baton.common.errors import (
    BatonError,
    ExceedsKvCapacity,
    InternalError,
    NoWorker,
    QueueFull,
    TransferTimeout,
)
from baton.router.json_body import MAX_BODY_BYTES
from baton.router.scripted import Script, ScriptedSource
from baton.router.served_model import ServedModel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return tiny_model(tmp_path_factory.mktemp("model"), name="org/tiny")


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "retry_after"),
    [
        (NoWorker("no decode worker", retry_after_s=2.5), 503, "server_error", "no_worker", "3"),
        (QueueFull("full"), 503, "server_error", "queue_full", "1"),
        (
            ExceedsKvCapacity("too long for every arena"),
            400,
            "invalid_request_error",
            "exceeds_kv_capacity",
            None,
        ),
        (InternalError("oops"), 500, "server_error", "internal", None),
    ],
)
async def test_an_error_before_the_first_token_is_a_status(
    model: ServedModel,
    is_stream: bool,
    error: BatonError,
    status: int,
    kind: str,
    code: str,
    retry_after: str | None,
) -> None:
    async with in_process(fronts_of(model, Script(frames=[], error=error))) as client:
        response = await client.post(CHAT, json=chat_body(stream=is_stream))
    assert response.status_code == status
    assert response.headers.get("retry-after") == retry_after
    assert response.json() == {
        "error": {"message": error.message, "type": kind, "param": None, "code": code}
    }


async def test_an_error_in_the_stream_is_an_event_of_it(model: ServedModel) -> None:
    script = script_of(model, error=TransferTimeout("the hand-over took too long"))
    fronts = fronts_of(model, script)
    async with openai_client(fronts) as client:
        stream = await client.chat.completions.create(
            model="", messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        chunks: list[Any] = []
        with pytest.raises(openai.APIError, match="hand-over took too long") as caught:
            await read_into(chunks, stream)
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == TEXT
    assert caught.value.code == "transfer_timeout"
    async with in_process(fronts) as client:
        response = await client.post(CHAT, json=chat_body(stream=True))
    assert "error" in events(response)[-1]


async def test_a_bug_is_an_internal_error_without_its_text(model: ServedModel) -> None:
    class Broken(ScriptedSource):
        def submit(self, spec: Any) -> Any:
            raise KeyError("canary")

    fronts = Fronts(model, Broken(script_of(model)))
    async with in_process(fronts) as client:
        response = await client.post(CHAT, json=chat_body())
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal"
    assert "canary" not in response.text


async def test_f28_a_request_without_memory_is_asked_again(model: ServedModel) -> None:
    class Full(ScriptedSource):
        def submit(self, spec: Any) -> Any:
            raise MemoryError

    fronts = Fronts(model, Full(script_of(model)))
    async with in_process(fronts) as client:
        response = await client.post(CHAT, json=chat_body())
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1


BAD_BODIES: list[tuple[str, str, Any, str | None]] = [
    ("B01 no messages", CHAT, {"messages": []}, "messages"),
    ("B01 absent messages", CHAT, {}, None),
    ("B01 empty prompt", COMPLETIONS, {"prompt": ""}, "prompt"),
    ("B01 empty list", COMPLETIONS, {"prompt": []}, "prompt"),
    ("B02", CHAT, chat_body(max_tokens=512), "max_tokens"),
    ("B02 new name", CHAT, chat_body(max_completion_tokens=512), "max_tokens"),
    ("B04", COMPLETIONS, {"prompt": [-1]}, "prompt"),
    ("B04 huge", COMPLETIONS, {"prompt": [2**63]}, "prompt"),
    ("B04 bool", COMPLETIONS, {"prompt": [True]}, "prompt"),
    ("B08 n", CHAT, chat_body(n=0), "n"),
    ("B08 n=2", CHAT, chat_body(n=2), "n"),
    ("B08 best_of", COMPLETIONS, {"prompt": "x", "best_of": 2}, "best_of"),
    ("B09", CHAT, chat_body(logprobs=True), "logprobs"),
    ("B09 top", CHAT, chat_body(top_logprobs=21), "top_logprobs"),
    ("B10", COMPLETIONS, {"prompt": ["a", "b"]}, "prompt"),
    ("B11", CHAT, chat_body(temperature=3), "temperature"),
    ("B11 text", CHAT, chat_body(temperature="1"), "temperature"),
    ("B11 huge", CHAT, chat_body(temperature=10**400), None),
    ("B12", CHAT, chat_body(max_tokens=0), "max_tokens"),
    ("B12 huge", CHAT, chat_body(max_tokens=2**63), "max_tokens"),
    ("B12 float", CHAT, chat_body(max_tokens=1.5), "max_tokens"),
    ("B13", CHAT, chat_body(stop=[""]), "stop"),
    ("B14 key", CHAT, chat_body(logit_bias={"-1": 1}), "logit_bias"),
    ("B14 id", CHAT, chat_body(logit_bias={"4000": 1}), "logit_bias"),
    ("B15", CHAT, chat_body(response_format={"type": "json_object"}), "response_format"),
    ("B16", CHAT, chat_body(chat_template="{{ 1 }}"), "chat_template"),
    ("B16 kwargs", CHAT, chat_body(chat_template_kwargs={"a": 1}), "chat_template_kwargs"),
    ("B17", CHAT, chat_body(kv_transfer_params={}), "kv_transfer_params"),
    ("B17 host", CHAT, chat_body(remote_host="10.0.0.1"), "remote_host"),
    ("B17 id", CHAT, chat_body(request_id="10.0.0.1:80"), "request_id"),
    ("unknown", CHAT, chat_body(temprature=1), "temprature"),
    ("tools", CHAT, chat_body(tools=[{"type": "function"}]), "tools"),
    ("audio", CHAT, chat_body(audio={"voice": "x"}), "audio"),
    ("echo", COMPLETIONS, {"prompt": "x", "echo": True}, "echo"),
    ("options", CHAT, chat_body(stream_options={}), "stream_options"),
    ("role", CHAT, {"messages": [{"role": "im_end", "content": "x"}]}, "messages[0].role"),
    ("null content", CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (
        "image",
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content",
    ),
    (
        "tool call",
        CHAT,
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]},
        "messages[0].tool_calls",
    ),
]


@pytest.mark.parametrize(
    ("path", "body", "param"), [row[1:] for row in BAD_BODIES], ids=[row[0] for row in BAD_BODIES]
)
async def test_bad_bodies(model: ServedModel, path: str, body: Any, param: str | None) -> None:
    fronts = fronts_of(model)
    async with in_process(fronts) as client:
        response = await client.post(path, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param
    assert not fronts.source.streams


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[1]",
        b'{"prompt": "canary", "prompt": "y"}',
        b'{"prompt": "x", "logit_bias": {"1": 1, "1": 2}}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": -Infinity}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "canary \\ud800"}',
        b'{"prompt": "x", "model": "\\udfff"}',
        b'{"prompt": "x", "\\udfff": 1}',
        b'{"prompt": "canary \xff"}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
async def test_b05_b06_bodies_that_are_no_json(model: ServedModel, raw: bytes) -> None:
    fronts = fronts_of(model)
    async with in_process(fronts) as client:
        response = await client.post(COMPLETIONS, content=raw)
    assert response.status_code == 400
    assert "canary" not in response.text
    assert not fronts.source.streams


async def test_surrogate_pairs_and_nul_are_text(model: ServedModel) -> None:
    raw = b'{"prompt": "\\ud83c\\udf36\\u0000"}'
    fronts = fronts_of(model)
    async with in_process(fronts) as client:
        response = await client.post(COMPLETIONS, content=raw)
    assert response.status_code == 200
    spec = fronts.source.streams[0].spec
    assert model.tokenizer.decode(spec.prompt_tokens, skip_special_tokens=True) == "🌶\0"


async def test_fields_that_change_nothing_are_ignored(model: ServedModel) -> None:
    body = chat_body(
        user="u", store=True, metadata={"a": "b"}, verbosity="low", safety_identifier="s",
        service_tier="auto", n=1, logprobs=False, tools=[], response_format={"type": "text"},
        temperature=None, tool_choice="auto", skip_special_tokens=True,
    )  # fmt: skip
    body["messages"] = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "annotations": [], "audio": None},
        {"role": "user", "content": "d", "name": "Ann"},
    ]
    fronts = fronts_of(model)
    async with in_process(fronts) as client:
        response = await client.post(CHAT, json=body)
    assert response.status_code == 200
    prompt = model.tokenizer.decode(fronts.source.streams[0].spec.prompt_tokens)
    assert "<|im_start|>user\na\nb<|im_end|>" in prompt


async def test_statuses_of_http_itself(model: ServedModel) -> None:
    fronts = fronts_of(model)
    async with in_process(fronts) as client:
        form = await client.post(CHAT, content=b"{}", headers={"content-type": "text/plain"})
        packed = await client.post(CHAT, content=b"{}", headers={"content-encoding": "gzip"})
        large = await client.post(CHAT, content=b" " * (MAX_BODY_BYTES + 1))
        chunked = await client.post(CHAT, content=_many_chunks())
        verb = await client.get(CHAT)
        nowhere = await client.post("/v1/embeddings", json={})
        unknown = await client.post(CHAT, json=chat_body(model="nope"))
    assert [form.status_code, packed.status_code] == [415, 415]
    assert [large.status_code, chunked.status_code] == [413, 413]
    assert [verb.status_code, nowhere.status_code, unknown.status_code] == [405, 404, 404]
    assert "POST" in verb.headers["allow"]
    assert unknown.json()["error"]["code"] == "model_not_found"
    for response in (form, packed, large, chunked, verb, nowhere):
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert not fronts.source.streams


async def _many_chunks() -> AsyncIterator[bytes]:
    for _ in range(MAX_BODY_BYTES // 65536 + 1):
        yield b" " * 65536


@pytest.mark.parametrize(
    ("sent", "is_kept"), [("req-1.A_b", True), ("10.0.0.1:80", False), ("x" * 129, False)]
)
async def test_request_ids(model: ServedModel, sent: str, is_kept: bool) -> None:
    fronts = fronts_of(model)
    async with in_process(fronts) as client:
        good = await client.post(CHAT, json=chat_body(), headers={"x-request-id": sent})
        bad = await client.post(CHAT, json={}, headers={"x-request-id": sent})
    assert (good.headers["x-request-id"] == sent) == is_kept
    assert (bad.headers["x-request-id"] == sent) == is_kept
    assert good.headers["x-request-id"] == fronts.source.streams[0].spec.request_id
