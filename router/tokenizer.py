"""Text to token ids and back, by the model folder's `tokenizer.json`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from baton.common.errors import InvalidRequest, ModelError
from baton.router.control_text import ControlText

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"


class ModelTokenizer:
    """The tokenizer of one model. Thread-safe: encoding changes nothing.

    Control tokens: `encode` turns the strings of special tokens into those tokens, because a raw
    prompt is written by whoever also writes its markup (vLLM does the same). A chat message is
    not: `encode_chat` lets only the template's own control tokens be tokens.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ModelError, naming the file, when a file is missing or broken."""
        self.raw = _load(folder / TOKENIZER_FILE)
        self.vocab_size: int = self.raw.get_vocab_size(with_added_tokens=True)
        self.special_tokens = read_special_tokens(folder)
        added = self.raw.get_added_tokens_decoder()
        self._control_ids = {token.content: id_ for id_, token in added.items() if token.special}
        self.control_text = ControlText(list(self._control_ids))
        self._bos_id = self._id_of("bos_token")
        # A second copy, so that no thread ever sees the flag change under its hands.
        self._literal = _load(folder / TOKENIZER_FILE)
        self._literal.encode_special_tokens = True

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.raw.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`, with at most one BOS. Raises InvalidRequest on lone surrogates."""
        check_text(text)
        ids: list[int] = self.raw.encode(text, add_special_tokens=add_special_tokens).ids
        doubled = len(ids) > 1 and ids[0] == ids[1] == self._bos_id
        return ids[1:] if add_special_tokens and doubled else ids

    def encode_chat(self, rendered: str, mark: str | None) -> list[int]:
        """Token ids of a rendered chat whose user strings were marked by `control_text.mark`.

        With a mark, each stretch between the template's own control tokens is encoded by itself,
        as text; without, the whole is encoded at once.
        """
        if mark is None:
            return self.encode(rendered, add_special_tokens=False)
        check_text(rendered)
        ids: list[int] = []
        for piece, is_control in self.control_text.split(rendered):
            if is_control:
                ids.append(self._control_ids[piece])
            else:
                text = piece.replace(mark, "")
                ids.extend(self._literal.encode(text, add_special_tokens=False).ids)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `ids`, each of which must be at least 0 and below 2³²; unknown ids are ''."""
        return self.raw.decode(ids, skip_special_tokens=skip_special_tokens)


def check_text(text: str, field: str = "prompt") -> None:
    """Raise InvalidRequest unless `text` has a UTF-8 form."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{field} holds a lone surrogate at character {error.start}; send valid Unicode",
            field=field,
        ) from None


def read_special_tokens(folder: Path) -> dict[str, str]:
    """The strings of `bos_token`, `eos_token` and their like, as chat templates see them."""
    tokens: dict[str, str] = {}
    for name in (SPECIAL_TOKENS_FILE, CONFIG_FILE):
        for key, value in read_json(folder / name).items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                tokens[key] = content
    return tokens


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty when there is no such file. Raises ModelError otherwise."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {error}; fetch the model folder again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds no JSON object; fetch the model folder again")
    return content


def _load(path: Path) -> Tokenizer:
    if not path.is_file():
        raise ModelError(f"{path}: no such file; Baton needs a model folder with {TOKENIZER_FILE}")
    try:
        tokenizer: Tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        # The library raises bare Exception for every way in which a file can be broken.
        raise ModelError(f"{path}: {error}; fetch the model folder again") from error
    # Some folders are saved with the settings of their training run.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
