"""A client of a router's InferenceService.

    async with BatonClient("127.0.0.1:50051") as client:
        async for chunk in client.generate("Once upon a time", max_tokens=32):
            ...

Errors are those of `baton.common.errors`, as the router named them.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final, Self, TypedDict, Unpack

import grpc

from baton.client.failures import baton_error
from baton.client.replies import Chunk, Completion, Finish, Message, ModelCard
from baton.common.errors import InternalError, InvalidRequest
from baton.common.grpc_options import channel_options
from baton.common.sampling import FinishReason, Mode
from baton.v1 import common_pb2, inference_pb2, inference_pb2_grpc

DEFAULT_ROUTER: Final = "127.0.0.1:50051"

Prompt = str | Sequence[int] | Sequence[Message]
"""Raw text, token ids, or the messages of a chat, which take the model's chat template."""

_FINISH: Final = {
    common_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    common_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}
_MODE: Final = {common_pb2.MODE_DISAGG: Mode.DISAGG, common_pb2.MODE_LOCAL: Mode.LOCAL}


class SamplingFields(TypedDict, total=False):
    """How tokens are chosen; what is absent takes the model's own setting, then the default."""

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    min_tokens: int | None
    ignore_eos: bool | None
    logit_bias: Mapping[int, float] | None
    stop_token_ids: Sequence[int] | None


class BatonClient:
    """One channel to one router, for one event loop."""

    def __init__(self, address: str = DEFAULT_ROUTER) -> None:
        self.address = address
        self._channel = grpc.aio.insecure_channel(address, options=channel_options())
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End running calls and close the connection."""
        await self._channel.close()

    async def generate(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        stop: Sequence[str] = (),
        request_id: str = "",
        timeout_s: float | None = None,
        **sampling: Unpack[SamplingFields],
    ) -> AsyncIterator[Chunk]:
        """The answer piece by piece; closing the iterator cancels the request.

        An empty `model` takes the only one of the cluster. A match of a `stop` string is not part
        of the answer.
        """
        request = inference_pb2.GenerateRequest(
            model=model, sampling=_sampling_to_pb(sampling), stop=stop, request_id=request_id
        )
        _put_prompt(request, prompt)
        call = self._stub.Generate(request, timeout=timeout_s)
        has_ended = False
        try:
            async for response in call:
                has_ended = response.HasField("finish")
                yield _chunk(response)
            if not has_ended:
                raise InternalError(f"{self.address} ended the answer without saying how")
        except grpc.aio.AioRpcError as error:
            raise baton_error(error, self.address) from error
        finally:
            call.cancel()

    async def complete(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        stop: Sequence[str] = (),
        request_id: str = "",
        timeout_s: float | None = None,
        **sampling: Unpack[SamplingFields],
    ) -> Completion:
        """The whole answer."""
        text: list[str] = []
        token_ids: list[int] = []
        finish = None
        async for chunk in self.generate(
            prompt,
            model=model,
            stop=stop,
            request_id=request_id,
            timeout_s=timeout_s,
            **sampling,
        ):
            text.append(chunk.text)
            token_ids.extend(chunk.token_ids)
            finish = chunk.finish
        assert finish is not None, "generate raises for an answer without a finish"
        return Completion("".join(text), tuple(token_ids), finish)

    async def models(self) -> list[ModelCard]:
        """The models that live workers serve."""
        try:
            reply = await self._stub.ListModels(inference_pb2.ListModelsRequest())
        except grpc.aio.AioRpcError as error:
            raise baton_error(error, self.address) from error
        return [ModelCard(card.name, card.max_model_len) for card in reply.models]

    async def tokenize(self, prompt: str | Sequence[Message], *, model: str = "") -> list[int]:
        """Token ids of a text or a chat, as `generate` would see them."""
        request = inference_pb2.TokenizeRequest(model=model)
        _put_prompt(request, prompt)
        try:
            reply = await self._stub.Tokenize(request)
        except grpc.aio.AioRpcError as error:
            raise baton_error(error, self.address) from error
        return list(reply.token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        request = inference_pb2.DetokenizeRequest(model=model, token_ids=_ids(token_ids))
        try:
            reply: inference_pb2.DetokenizeResponse = await self._stub.Detokenize(request)
        except grpc.aio.AioRpcError as error:
            raise baton_error(error, self.address) from error
        return reply.text


def complete(
    prompt: Prompt,
    *,
    address: str = DEFAULT_ROUTER,
    model: str = "",
    stop: Sequence[str] = (),
    timeout_s: float | None = None,
    **sampling: Unpack[SamplingFields],
) -> Completion:
    """The whole answer, for code without an event loop; a connection of its own per call."""

    async def once() -> Completion:
        async with BatonClient(address) as client:
            return await client.complete(
                prompt, model=model, stop=stop, timeout_s=timeout_s, **sampling
            )

    return asyncio.run(once())


def _sampling_to_pb(fields: SamplingFields) -> common_pb2.SamplingParams:
    wire = common_pb2.SamplingParams()
    for name, value in fields.items():
        if value is None:
            continue
        try:
            wire.MergeFrom(common_pb2.SamplingParams(**{name: _field_to_pb(name, value)}))
        except (TypeError, ValueError, AttributeError) as error:
            raise InvalidRequest(
                f"{name} is {value!r}, which is out of its range or of the wrong type", field=name
            ) from error
    return wire


def _field_to_pb(name: str, value: Any) -> Any:
    if name != "logit_bias":
        return value
    return [common_pb2.LogitBias(token_id=token, bias=bias) for token, bias in value.items()]


def _put_prompt(
    request: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest, prompt: Prompt
) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt and isinstance(prompt[0], Message):
        for message in prompt:
            assert isinstance(message, Message), "a chat holds nothing but messages"
            request.chat.messages.add(role=message.role, content=message.content)
    else:
        assert isinstance(request, inference_pb2.GenerateRequest), "token ids need no tokenizing"
        request.tokens.SetInParent()
        request.tokens.ids.extend(_ids(prompt))


def _ids(tokens: Sequence[int] | Sequence[Message]) -> list[int]:
    ids = [token for token in tokens if isinstance(token, int) and 0 <= token < 2**32]
    if len(ids) != len(tokens):
        raise InvalidRequest("a token id is a whole number of at most 32 bits", field="prompt")
    return ids


def _chunk(response: inference_pb2.GenerateResponse) -> Chunk:
    finish = _finish(response.finish) if response.HasField("finish") else None
    return Chunk(response.text, tuple(response.token_ids), finish)


def _finish(wire: inference_pb2.Finish) -> Finish:
    if wire.reason not in _FINISH or wire.report.mode not in _MODE:
        raise InternalError("the router is newer than this client: it ended in an unknown way")
    usage, report = wire.usage, wire.report
    return Finish(
        reason=_FINISH[wire.reason],
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        request_id=report.request_id,
        mode=_MODE[report.mode],
        prefill_worker=report.prefill_worker,
        decode_worker=report.decode_worker,
        kv_bytes=report.kv_bytes,
        kv_blocks=report.kv_blocks,
        transport=report.transport,
        ttft_s=report.ttft_s,
        tpot_s=report.tpot_s,
        prefill_computed_tokens=report.prefill_computed_tokens,
        decode_forwarded_tokens=report.decode_forwarded_tokens,
        decode_cached_tokens=report.decode_cached_tokens,
        attempts=report.attempts,
    )
