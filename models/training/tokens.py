"""The tokenizer of baton-tiny, and conversations as token rows with a mask of what is learned.

A chat is `<|begin|>` and then, per turn, a role token, the text and `<|end|>`; the template writes
the same, so that texts encoded turn by turn equal the rendered chat encoded at once.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from baton.models.conversations import tasks
from baton.models.conversations.tasks import Turn

BEGIN, END, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"
SPECIAL = (BEGIN, END, USER, ASSISTANT)
BEGIN_ID, END_ID, USER_ID, ASSISTANT_ID = range(4)
VOCAB_SIZE = 1280

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|assistant|>' if message.role == 'assistant' else '<|user|>' }}"
    "{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}\n"
)


def train_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE over generated turns; every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(Random(seed)), trainer)
    return tokenizer


def _texts(rng: Random) -> Iterable[str]:
    for _ in range(4000):
        long = tasks.recall(rng, num_tokens=300, num_facts=8, num_questions=3)
        turns = [*long.turns, *tasks.multi_turn(rng), *tasks.as_json(rng)]
        turns.extend(turn for make in tasks.SHORT for turn in make(rng))
        for turn in turns:
            yield turn.user
            yield turn.assistant


def encode_prompt(tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[int]:
    """The chat up to where the assistant answers the last turn, as the template renders it."""
    earlier, _ = encode_turns(tokenizer, turns[:-1])
    asked = tokenizer.encode(turns[-1].user, add_special_tokens=False).ids
    return [BEGIN_ID, *earlier, USER_ID, *asked, END_ID, ASSISTANT_ID]


def load_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def encode_turns(tokenizer: Tokenizer, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
    """Token ids of the turns, without `<|begin|>`, and 1 where the model has to predict them."""
    texts = [text for turn in turns for text in (turn.user, turn.assistant)]
    encoded = [found.ids for found in tokenizer.encode_batch(texts, add_special_tokens=False)]
    ids: list[int] = []
    learned: list[int] = []
    for index in range(0, len(encoded), 2):
        asked, answer = encoded[index], encoded[index + 1]
        ids += [USER_ID, *asked, END_ID, ASSISTANT_ID, *answer, END_ID]
        learned += [0] * (len(asked) + 3) + [1] * (len(answer) + 1)
    return ids, learned
