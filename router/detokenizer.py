"""Token ids to text as they come, without ever splitting a character.

Built on `tokenizers.decoders.DecodeStream`, with the two places where it fails alone minded:

* Started on a prompt that ends inside a character, it would emit the prompt as output. It is
  started on a short tail here, and what the reader of the prompt has seen is cut off the first
  text. A character that the output completes belongs to the output.
* Byte-fallback vocabularies can turn emitted bytes into replacement characters in hindsight; it
  then raises "Invalid prefix". What was emitted stays, and decoding starts anew behind it.
"""

from collections.abc import Sequence
from typing import Final

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

REPLACEMENT: Final = "\ufffd"
TAIL_TOKENS: Final = 6
# No character takes more than four tokens, so a longer silence is not one being completed.
MAX_HELD_TOKENS: Final = 16


class Detokenizer:
    """The text of one answer; special tokens have none.

    All pushed and flushed text together is decode(prompt + output) without decode(prompt).
    """

    def __init__(self, tokenizer: Tokenizer, prompt_tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._begin(_settled_tail(tokenizer, prompt_tokens))

    def _begin(self, context: list[int]) -> None:
        """Start decoding behind `context`, whose text is out."""
        # Ids whose text is out, then ids whose text is not: what a flush decodes.
        self._context = context
        self._held: list[int] = []
        shown = self._decode(context)
        # Where the stream would repeat its context: what its first text may not repeat.
        self._shown = shown if shown.endswith(REPLACEMENT) else None
        self._stream = DecodeStream(ids=context, skip_special_tokens=True)

    def push(self, ids: list[int]) -> str:
        """Text that became final with `ids`; '' while a character is incomplete."""
        if not ids:
            return ""
        self._held.extend(ids)
        try:
            text = self._stream.step(self._tokenizer, ids)
        except Exception as error:
            # The library has no class of its own for it.
            if "Invalid prefix" not in str(error):
                raise
            return self._restart()
        if text is None:
            return self._restart() if len(self._held) > MAX_HELD_TOKENS else ""
        self._context, self._held = self._held, []
        return self._without_shown(text)

    def flush(self) -> str:
        """The text still held, incomplete characters as U+FFFD. Call it once, at the end."""
        return self._restart() if self._held else ""

    def _restart(self) -> str:
        """Emit all that is held and start anew behind it."""
        before = self._decode(self._context)
        after = self._decode(self._context + self._held)
        if self._shown is not None:
            text = self._without_shown(after)
        elif after.startswith(before):
            text = after[len(before) :]
        else:
            text = self._decode(self._held)
        self._begin(self._held)
        return text

    def _without_shown(self, text: str) -> str:
        """Cut off what is out: its characters, and as many U+FFFD of its end as still stand."""
        shown, self._shown = self._shown, None
        if shown is None:
            return text
        settled = shown.rstrip(REPLACEMENT)
        rest = text.removeprefix(settled)
        unfinished = len(shown) - len(settled)
        leading = len(rest) - len(rest.lstrip(REPLACEMENT))
        return rest[min(leading, unfinished) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _settled_tail(tokenizer: Tokenizer, prompt_tokens: Sequence[int]) -> list[int]:
    """The shortest of a few tails of the prompt with a whole character in it, else the prompt.

    Behind a whole character no earlier token can change how later ones decode.
    """
    length = TAIL_TOKENS
    while length < len(prompt_tokens):
        tail = list(prompt_tokens[-length:])
        text = tokenizer.decode(tail, skip_special_tokens=True)
        if text.strip(REPLACEMENT):
            return tail
        length *= 4
    return list(prompt_tokens)
