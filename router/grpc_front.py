"""`baton.v1.InferenceService` over a token source: the same rules as over HTTP."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Final

import grpc

from baton.common.codec import finish_to_pb
from baton.common.errors import BatonError, InvalidRequest
from baton.common.sampling import Mode
from baton.router.answer import TextEvent, open_answer
from baton.router.catalog import Catalog
from baton.router.generation import Report, TokenSource, Usage
from baton.router.grpc_errors import abort_with
from baton.router.intake import (
    ChatPrompt,
    GenerationRequest,
    Intake,
    Prompt,
    TextPrompt,
    TokenPrompt,
    tokenize,
)
from baton.router.validation import SamplingRequest
from baton.v1 import common_pb2, inference_pb2, inference_pb2_grpc

DEFAULT_TIMEOUT_S: Final = 600.0

_MODE: Final = {Mode.DISAGG: common_pb2.MODE_DISAGG, Mode.LOCAL: common_pb2.MODE_LOCAL}

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """`timeout_s`: the deadline of a call that names none, and the longest one taken."""

    def __init__(
        self,
        source: TokenSource,
        catalog: Catalog,
        intake: Intake,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self._intake = intake
        self._catalog = catalog
        self._source = source
        self._timeout_s = timeout_s

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        try:
            asked = _asked(request, self._timeout(context))
            request_id = self._intake.name_request(asked.request_id)
            admitted = await self._intake.admit(asked, request_id)
            async with aclosing(open_answer(self._source, admitted)) as events:
                async for event in events:
                    yield _response(event)
        except BatonError as error:
            await abort_with(context, error)

    def _timeout(self, context: Context) -> float:
        left = context.time_remaining()
        return self._timeout_s if left is None else min(left, self._timeout_s)

    async def ListModels(
        self,
        request: inference_pb2.ListModelsRequest,  # noqa: ARG002 (it has no fields)
        context: Context,  # noqa: ARG002 (nothing can fail)
    ) -> inference_pb2.ListModelsResponse:
        cards = [
            inference_pb2.ModelCard(name=model.name, max_model_len=model.max_model_len)
            for model in self._catalog.models()
        ]
        return inference_pb2.ListModelsResponse(models=cards)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        try:
            model = self._catalog.get(request.model)
            token_ids = await tokenize(model, _prompt(request))
        except BatonError as error:
            await abort_with(context, error)
        return inference_pb2.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        try:
            model = self._catalog.get(request.model)
            ids = list(request.token_ids)
            if ids and max(ids) >= model.vocab_size:
                raise InvalidRequest(
                    f"token_ids has an id outside 0..{model.vocab_size - 1}", field="token_ids"
                )
        except BatonError as error:
            await abort_with(context, error)
        return inference_pb2.DetokenizeResponse(text=model.tokenizer.decode(ids))


def _prompt(request: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest) -> Prompt:
    kind = request.WhichOneof("prompt")
    if kind == "text":
        return TextPrompt(request.text)
    if kind == "chat":
        messages = request.chat.messages
        return ChatPrompt([{"role": one.role, "content": one.content} for one in messages])
    if isinstance(request, inference_pb2.GenerateRequest) and kind == "tokens":
        return TokenPrompt(list(request.tokens.ids))
    raise InvalidRequest("the request has no prompt; send text, tokens or chat", field="prompt")


def _asked(request: inference_pb2.GenerateRequest, timeout_s: float) -> GenerationRequest:
    return GenerationRequest(
        model=request.model,
        prompt=_prompt(request),
        sampling=_sampling(request.sampling),
        stop=tuple(request.stop),
        request_id=request.request_id,
        timeout_s=timeout_s,
    )


def _sampling(wire: common_pb2.SamplingParams) -> SamplingRequest:
    present = {field.name: value for field, value in wire.ListFields()}
    present["logit_bias"] = tuple((one.token_id, one.bias) for one in wire.logit_bias)
    present["stop_token_ids"] = tuple(wire.stop_token_ids)
    return SamplingRequest(**present)


def _response(event: TextEvent) -> inference_pb2.GenerateResponse:
    response = inference_pb2.GenerateResponse(text=event.text, token_ids=event.token_ids)
    if event.finish is not None:
        assert event.usage is not None, "the last event of an answer carries usage"
        assert event.report is not None, "the last event of an answer carries the report"
        finish = response.finish
        finish.reason = finish_to_pb(event.finish)
        finish.usage.CopyFrom(_usage(event.usage))
        finish.report.CopyFrom(_report(event.report))
    return response


def _usage(usage: Usage) -> inference_pb2.Usage:
    return inference_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def _report(report: Report) -> inference_pb2.Report:
    return inference_pb2.Report(
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
