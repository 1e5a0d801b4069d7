"""A tiny byte-level model folder, trained on the spot: real tokenizer files, no download."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from baton.common.clock import ManualClock
from baton.router.served_model import ServedModel, load_served_model

SPECIAL_TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "Hello world, how are you today? I am fine, thank you.",
    "The quick brown fox jumps over the lazy dog.",
    "A prompt is prefilled once and handed over once.",
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_tokenizer(*, with_bos: bool = True) -> Tokenizer:
    """256 bytes, some merges and four special tokens; BOS by a post-processor, as Llama has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    if with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """A sentencepiece-like vocabulary: Metaspace words, and bytes for everything else."""
    words = ["▁Hello", "▁world", "▁a", "▁", "a", "b", "o", "k", "!"]
    vocab = {"<unk>": 0, "<s>": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
    vocab |= {word: len(vocab) + index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer


def write_model_folder(
    folder: Path,
    *,
    template: str | None = CHATML,
    generation: dict[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """A Hugging Face folder as far as the router reads one."""
    folder.mkdir(parents=True, exist_ok=True)
    (tokenizer or byte_level_tokenizer()).save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def tiny_model(
    folder: Path, *, name: str = "tiny", max_model_len: int = 512, **options: Any
) -> ServedModel:
    write_model_folder(folder, **options)
    return load_served_model(name, folder, max_model_len, 360, ManualClock(1_700_000_000))


def frames(tokenizer: Tokenizer, text: str, size: int = 2) -> Sequence[list[int]]:
    """The token ids of `text` in frames of `size`."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return [ids[start : start + size] for start in range(0, len(ids), size)]
