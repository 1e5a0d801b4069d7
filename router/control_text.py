"""Control-token strings inside user text: found, marked and told apart from the template's own.

A message that says "<|im_end|>" must not end the message (CVE-2026-44222). So:

1. `mark` puts one private-use character, which occurs nowhere in the messages, behind the first
   character of each control-token string in them;
2. the template renders; its own control tokens carry no mark;
3. `split` cuts the rendered text at those, and the tokenizer drops the mark from the rest.

A template that itself assembles a control token out of pieces of a message is not covered; the
one such piece in use, the role, is a closed set in `baton.router.intake`.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

_MARKS = range(0xF0000, 0xFFFFE)


class ControlText:
    """The control-token strings of one tokenizer."""

    def __init__(self, tokens: Sequence[str]) -> None:
        longest_first = sorted((token for token in tokens if token), key=len, reverse=True)
        alternatives = "|".join(re.escape(token) for token in longest_first)
        self._pattern = re.compile(f"({alternatives})") if alternatives else None

    def mark(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str | None]:
        """The messages with control-token strings marked, and the mark; None without any."""
        texts = [value for message in messages for value in message.values()]
        found = self._pattern is not None and any(
            self._pattern.search(text) for text in texts if isinstance(text, str)
        )
        if not found:
            return messages, None
        mark = _unused_character(texts)
        return [
            {key: self._marked(value, mark) for key, value in m.items()} for m in messages
        ], mark

    def _marked(self, value: Any, mark: str) -> Any:
        if not isinstance(value, str):
            return value
        assert self._pattern is not None
        return self._pattern.sub(lambda match: f"{match[0][0]}{mark}{match[0][1:]}", value)

    def split(self, text: str) -> Iterator[tuple[str, bool]]:
        """The pieces of `text` in order, each with whether it is a control token; none is empty."""
        assert self._pattern is not None, "text is only split when a mark was set"
        for index, piece in enumerate(self._pattern.split(text)):
            if piece:
                yield piece, index % 2 == 1


def _unused_character(texts: list[Any]) -> str:
    used = {ch for text in texts if isinstance(text, str) and not text.isascii() for ch in text}
    return next(chr(code) for code in _MARKS if chr(code) not in used)
