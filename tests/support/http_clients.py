"""Requests to the HTTP front, by raw client and by OpenAI's own."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import openai
from support.fronts import Fronts
from support.tiny_model import frames

from baton.router.scripted import Script, ScriptedSource
from baton.router.served_model import ServedModel

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
TEXT = " Hello 🌶 world END and more"


def script_of(model: ServedModel, text: str = TEXT, **fields: Any) -> Script:
    return Script(frames=frames(model.tokenizer.raw, text), **fields)


def fronts_of(model: ServedModel, *scripts: Script) -> Fronts:
    return Fronts(model, ScriptedSource(*(scripts or [script_of(model)])))


@asynccontextmanager
async def in_process(fronts: Fronts) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app=fronts.app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://baton") as client:
        yield client


@asynccontextmanager
async def openai_client(fronts: Fronts) -> AsyncIterator[openai.AsyncOpenAI]:
    async with fronts.http() as port:
        url = f"http://127.0.0.1:{port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0) as client:
            yield client


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}], **fields}


def events(response: httpx2.Response) -> list[Any]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]
