"""The sampling defaults that a model's authors ship in `generation_config.json`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.common.errors import ModelError
from baton.router.tokenizer import read_json

GENERATION_FILE = "generation_config.json"
MODEL_FILE = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What a request gets where it says nothing. None: the model says nothing either."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    # Ends an answer; the workers know it too, the router needs it to leave its text out.
    eos_token_ids: frozenset[int] = frozenset()


def load_generation_defaults(folder: Path) -> GenerationDefaults:
    """Defaults of the model in `folder`; absent files give none. Raises ModelError on nonsense.

    `do_sample: false` is not read as greedy, and `max_new_tokens` becomes the default of
    max_tokens: both as vLLM does.
    """
    path = folder / GENERATION_FILE
    content = read_json(path)
    eos = content.get("eos_token_id")
    if eos is None:
        eos = read_json(folder / MODEL_FILE).get("eos_token_id")
    max_tokens = _number(content, "max_new_tokens", path)
    top_k = _number(content, "top_k", path)
    return GenerationDefaults(
        max_tokens=None if max_tokens is None else int(max_tokens),
        temperature=_number(content, "temperature", path),
        top_p=_number(content, "top_p", path),
        top_k=None if top_k is None else int(top_k),
        min_p=_number(content, "min_p", path),
        repetition_penalty=_number(content, "repetition_penalty", path),
        eos_token_ids=_ids(eos, path),
    )


def _number(content: dict[str, Any], name: str, path: Path) -> float | None:
    value = content.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ModelError(f"{path}: {name} is {value!r}; it must be a number")
    return float(value)


def _ids(value: Any, path: Path) -> frozenset[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in ids):
        raise ModelError(f"{path}: eos_token_id is {value!r}; it must be an id or a list of ids")
    return frozenset(ids)
