"""A model as the fronts see it: its words, its template, its limits."""

from dataclasses import dataclass
from pathlib import Path

from baton.common.clock import Clock
from baton.router.chat_template import ChatTemplate, load_chat_template
from baton.router.generation_config import GenerationDefaults, load_generation_defaults
from baton.router.tokenizer import ModelTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """`max_model_len`: prompt and answer together, in tokens. `vocab_size`: rows of the logits."""

    name: str
    max_model_len: int
    vocab_size: int
    tokenizer: ModelTokenizer
    template: ChatTemplate | None
    defaults: GenerationDefaults
    # KV tokens that the largest worker that decodes holds; bounds the answer of a request
    # without max_tokens. None: not known.
    kv_tokens: int | None = None


def load_served_model(
    name: str, folder: Path, max_model_len: int, vocab_size: int, clock: Clock
) -> ServedModel:
    """Read tokenizer, template and defaults from a Hugging Face folder. Raises ModelError."""
    tokenizer = ModelTokenizer(folder)
    return ServedModel(
        name=name,
        max_model_len=max_model_len,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        template=load_chat_template(folder, tokenizer.special_tokens, clock),
        defaults=load_generation_defaults(folder),
    )
