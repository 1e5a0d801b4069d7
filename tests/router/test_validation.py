"""The table of bad inputs, and what a good request becomes."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import tiny_model, write_model_folder

from baton.common.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    InvalidRequest,
    ModelError,
    ModelNotFound,
)
from baton.common.randomness import SeededRandomness
from baton.common.sampling import SamplingParams
from baton.router.catalog import FixedCatalog
from baton.router.generation import GenerationSpec
from baton.router.generation_config import GenerationDefaults, load_generation_defaults
from baton.router.intake import ChatPrompt, GenerationRequest, Intake, TextPrompt, TokenPrompt
from baton.router.served_model import ServedModel
from baton.router.validation import SamplingRequest, validate_sampling

VOCAB, MAX_LEN, PROMPT_LEN = 100, 64, 10
NAN, INF = math.nan, math.inf


def validate(defaults: GenerationDefaults | None = None, **fields: Any) -> SamplingParams:
    return validate_sampling(
        SamplingRequest(**fields),
        prompt_len=PROMPT_LEN,
        max_model_len=MAX_LEN,
        vocab_size=VOCAB,
        defaults=defaults or GenerationDefaults(),
        randomness=SeededRandomness(1),
    )


BAD_FIELDS: list[tuple[str, Any]] = [
    *(("temperature", value) for value in (NAN, INF, -INF, -0.1, 2.1)),
    *(("top_p", value) for value in (NAN, INF, 0.0, -0.1, 1.1)),
    *(("min_p", value) for value in (NAN, -0.1, 1.1)),
    *(("top_k", value) for value in (-2, -(2**63))),
    *(("repetition_penalty", value) for value in (NAN, INF, 0.0, -1.0, 2.5)),
    *(("presence_penalty", value) for value in (NAN, INF, -2.1, 2.1)),
    *(("frequency_penalty", value) for value in (NAN, -INF, -2.1, 2.1)),
    *(("max_tokens", value) for value in (0, -1, MAX_LEN - PROMPT_LEN + 1, 2**63)),
    *(("min_tokens", value) for value in (-1, MAX_LEN)),
    *(("seed", value) for value in (2**64, -(2**63) - 1)),
    ("logit_bias", tuple((token, 0.0) for token in range(301))),
    *(("logit_bias", ((token, 0.0),)) for token in (-1, VOCAB, 2**40)),
    *(("logit_bias", ((1, bias),)) for bias in (NAN, INF, 100.1, -101.0)),
    ("logit_bias", ((1, 0.5), (1, 0.5))),
    *(("stop_token_ids", (token,)) for token in (-1, VOCAB)),
    ("stop_token_ids", tuple([1] * 129)),
]


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS)
def test_bad_sampling_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate(**{field: value})
    assert caught.value.field == field


def test_max_tokens_over_the_context_has_its_own_class() -> None:
    with pytest.raises(ContextLengthExceeded, match="at most 54"):
        validate(max_tokens=55)
    assert validate(max_tokens=54).max_tokens == 54


def test_absent_fields() -> None:
    assert validate() == SamplingParams(max_tokens=54, seed=SeededRandomness(1).bits(64))


def test_the_request_comes_before_the_models_defaults() -> None:
    defaults = GenerationDefaults(
        max_tokens=20, temperature=0.6, top_p=0.9, top_k=20, min_p=0.05, repetition_penalty=1.1
    )
    params = validate(defaults, seed=7)
    assert params == SamplingParams(
        max_tokens=20,
        temperature=0.6,
        top_p=0.9,
        top_k=20,
        min_p=0.05,
        repetition_penalty=1.1,
        seed=7,
    )
    asked = validate(defaults, seed=7, temperature=0.0, top_p=1.0, top_k=0, max_tokens=54)
    assert (asked.temperature, asked.top_p, asked.top_k, asked.max_tokens) == (0.0, 1.0, 0, 54)
    assert validate(replace(defaults, max_tokens=1000)).max_tokens == 54


def test_values_that_mean_the_same_become_the_same() -> None:
    assert validate(top_k=-1).top_k == validate(top_k=VOCAB).top_k == 0
    assert validate(seed=-1).seed == 2**64 - 1
    assert validate(temperature=1e-30).temperature == 0.01


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return tiny_model(tmp_path_factory.mktemp("model"))


def request_of(**fields: Any) -> GenerationRequest:
    given: dict[str, Any] = {
        "model": "tiny",
        "prompt": TextPrompt("Hello"),
        "sampling": SamplingRequest(),
        "stop": (),
        "request_id": "",
        "timeout_s": 5.0,
    }
    return GenerationRequest(**(given | fields))


async def admit(served: ServedModel, **fields: Any) -> GenerationSpec:
    intake = Intake(FixedCatalog([served]), SeededRandomness(3))
    request = request_of(**fields)
    return (await intake.admit(request, intake.name_request(request.request_id))).spec


def chat(*messages: tuple[str, str]) -> ChatPrompt:
    return ChatPrompt([{"role": role, "content": content} for role, content in messages])


BAD_REQUESTS: list[tuple[str, dict[str, Any], type[Exception], str | None]] = [
    ("B01 empty text", {"prompt": TextPrompt("")}, InvalidRequest, "prompt"),
    ("B01 no tokens", {"prompt": TokenPrompt([])}, InvalidRequest, "prompt"),
    ("B01 no messages", {"prompt": chat()}, InvalidRequest, "messages"),
    ("B02 long prompt", {"prompt": TokenPrompt([5] * 512)}, ContextLengthExceeded, "prompt"),
    ("B02 no room", {"sampling": SamplingRequest(max_tokens=512)}, ContextLengthExceeded, None),
    ("B04 negative id", {"prompt": TokenPrompt([-1])}, InvalidRequest, "prompt"),
    ("B04 id of no token", {"prompt": TokenPrompt([360])}, InvalidRequest, "prompt"),
    ("B04 huge id", {"prompt": TokenPrompt([2**70])}, InvalidRequest, "prompt"),
    ("B05 surrogate", {"prompt": TextPrompt("\ud800")}, InvalidRequest, "prompt"),
    ("B05 surrogate in stop", {"stop": ("\ud800",)}, InvalidRequest, "stop"),
    ("B13 empty stop", {"stop": ("",)}, InvalidRequest, "stop"),
    ("B13 many stops", {"stop": ("x",) * 17}, InvalidRequest, "stop"),
    ("B13 long stop", {"stop": ("é" * 129,)}, InvalidRequest, "stop"),
    ("B17 odd request id", {"request_id": "10.0.0.1:80"}, InvalidRequest, "request_id"),
    ("B23 unknown model", {"model": "canary"}, ModelNotFound, "model"),
    ("B25 late", {"timeout_s": 0.0}, DeadlineExceeded, None),
    ("B32 empty salt", {"cache_salt": ""}, InvalidRequest, "cache_salt"),
    ("B32 long salt", {"cache_salt": "x" * 129}, InvalidRequest, "cache_salt"),
    ("odd role", {"prompt": chat(("im_end", "x"))}, InvalidRequest, "messages[0].role"),
]


@pytest.mark.parametrize(
    ("fields", "error", "field"),
    [row[1:] for row in BAD_REQUESTS],
    ids=[row[0] for row in BAD_REQUESTS],
)
async def test_bad_requests(
    fields: dict[str, Any], error: type[Exception], field: str | None, model: ServedModel
) -> None:
    with pytest.raises(error) as caught:
        await admit(model, **fields)
    assert type(caught.value) is error
    if field is not None:
        assert caught.value.field == field  # type: ignore[attr-defined]
    assert "canary" not in str(caught.value)


async def test_a_good_request(model: ServedModel) -> None:
    spec = await admit(model, model="", stop=("END",), request_id="req.1_a-B")
    assert spec.model == "tiny"
    assert spec.request_id == "req.1_a-B"
    assert spec.prompt_tokens == model.tokenizer.encode("Hello", add_special_tokens=True)
    assert spec.sampling.max_tokens == 512 - len(spec.prompt_tokens)
    assert (spec.stop, spec.tenant_key, spec.timeout_s) == (("END",), b"", 5.0)


async def test_a_salt_changes_the_tenant_key_and_nothing_else(model: ServedModel) -> None:
    plain = await admit(model, request_id="r")
    first, again = [await admit(model, request_id="r", cache_salt="a") for _ in range(2)]
    other = await admit(model, request_id="r", cache_salt="b")
    assert first == again
    assert len({plain.tenant_key, first.tenant_key, other.tenant_key}) == 3
    assert replace(first, tenant_key=b"") == plain


async def test_a_model_without_a_template_takes_no_chat(tmp_path: Path) -> None:
    bare = tiny_model(tmp_path, template=None)
    with pytest.raises(InvalidRequest, match="no chat template"):
        await admit(bare, prompt=chat(("user", "hi")))


def test_an_empty_name_is_no_choice_between_two(model: ServedModel) -> None:
    catalog = FixedCatalog([model, replace(model, name="other")])
    with pytest.raises(InvalidRequest, match="other, tiny"):
        catalog.get("")


def test_generation_config(tmp_path: Path) -> None:
    written = {"temperature": 0.6, "top_k": 20, "eos_token_id": [1, 3], "max_new_tokens": 99}
    write_model_folder(tmp_path, generation=written)
    assert load_generation_defaults(tmp_path) == GenerationDefaults(
        max_tokens=99, temperature=0.6, top_k=20, eos_token_ids=frozenset({1, 3})
    )
    (tmp_path / "generation_config.json").write_text('{"top_p": "hot"}')
    with pytest.raises(ModelError, match="top_p"):
        load_generation_defaults(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert load_generation_defaults(tmp_path) == GenerationDefaults(eos_token_ids=frozenset({1}))
