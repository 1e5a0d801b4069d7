"""Clients on virtual time: what they ask for, when they go away, and what they were told.

Each token is compared with the oracle's at once, so that a wrong one is found where it appears.
"""

from collections.abc import Callable
from pathlib import Path

from sim.routers import SimRouter
from sim.world import World
from support.history import History, RequestLog
from support.oracle_model import EOS_ID, words_per_token, write_oracle_model

from baton.common.errors import (
    BatonError,
    DeadlineExceeded,
    NoWorker,
    QueueFull,
    TransferError,
    UnknownRequest,
    WorkerLost,
)
from baton.common.sampling import SamplingParams
from baton.engine.oracle import oracle_answer, oracle_sampled_answer
from baton.router.generation import GenerationSpec, TokenEvent
from baton.router.journal import JournalEntry

VOCAB_SIZE = 48
MAX_MODEL_LEN = 48
MAX_PROMPT = 26
MAX_OUTPUT = 14
RETRY_S = 0.5
SOON_S, LONG_S = 4.0, 60.0

# What may end a request when workers are lost again and again, or time runs out.
ALLOWED = (WorkerLost, NoWorker, QueueFull, DeadlineExceeded, TransferError, UnknownRequest)


def write_model(folder: Path) -> Path:
    return write_oracle_model(
        folder, vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN, tokenizer=False
    )


class Prompts:
    """Prompts of one cluster: some begin alike, so that caches have hits."""

    def __init__(self, world: World) -> None:
        self._random = world.random
        self._stems = [self._tokens(MAX_PROMPT) for _ in range(3)]

    def draw(self) -> list[int]:
        length = self._random.randint(1, MAX_PROMPT)
        if self._random.random() < 0.4:
            return self._tokens(length)
        stem = self._random.choice(self._stems)[: self._random.randint(1, length)]
        return stem + self._tokens(length - len(stem))

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(2, VOCAB_SIZE) for _ in range(count)]


def draw_sampling(world: World) -> SamplingParams:
    """Mostly greedy, which is cheap; some with all that must survive another attempt."""
    random = world.random
    max_tokens = random.randint(1, MAX_OUTPUT)
    if random.random() < 0.85:
        return SamplingParams(
            max_tokens=max_tokens, temperature=0.0, ignore_eos=random.random() < 0.9
        )
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0,
        top_k=random.choice([0, 8]),
        seed=random.getrandbits(32),
        repetition_penalty=random.choice([1.0, 1.3]),
        presence_penalty=random.choice([0.0, 0.5]),
        min_tokens=random.randint(0, max_tokens),
        stop_token_ids=tuple(random.sample(range(2, VOCAB_SIZE), 6)),
    )


def answer_to(prompt: list[int], sampling: SamplingParams) -> list[int]:
    """The one right answer."""
    if sampling.is_greedy and not sampling.has_penalties:
        return oracle_answer(
            prompt,
            sampling.max_tokens,
            VOCAB_SIZE,
            num_words=words_per_token(),
            stop_token_ids=() if sampling.ignore_eos else (EOS_ID,),
        )
    return oracle_sampled_answer(
        prompt,
        sampling,
        VOCAB_SIZE,
        num_words=words_per_token(),
        eos_token_ids=(EOS_ID,),
        max_model_len=MAX_MODEL_LEN,
    )


class Client:
    """One request of one client; tries again for as long as nobody accepts it."""

    def __init__(
        self,
        world: World,
        history: History,
        router: Callable[[], SimRouter | None],
        spec: GenerationSpec,
        *,
        cancels_after_s: float | None,
    ) -> None:
        self.spec = spec
        self.log: RequestLog | None = None
        self.entry: JournalEntry | None = None
        self.router: SimRouter | None = None
        self.answer = answer_to(spec.prompt_tokens, spec.sampling)
        self._world = world
        self._history = history
        self._find_router = router
        self._cancels_after_s = cancels_after_s

    @property
    def has_ended(self) -> bool:
        return self.log is not None and bool(self.log.ends)

    def ask(self) -> None:
        """Submit, now or as soon as somebody accepts it."""
        router = self._find_router()
        self.entry = router.submit(self.spec, self._received) if router is not None else None
        if self.entry is None:
            self._world.at(RETRY_S, self.ask)
            return
        self.router = router
        if self.log is None:
            self._start_log()
        if self._cancels_after_s is not None:
            self._world.at(self._cancels_after_s, self._cancel)

    def lost(self) -> None:
        """Its router is gone, and its connection with it."""
        if self.log is not None and not self.has_ended:
            self.log.cancelled()

    def _start_log(self) -> None:
        self.log = self._history.submit(
            self.spec.request_id,
            self.spec.prompt_tokens,
            max_tokens=self.spec.sampling.max_tokens,
            deadline_s=self.spec.timeout_s,
        )

    def _cancel(self) -> None:
        if self.has_ended or self.router is None or not self.router.process.is_alive:
            return
        assert self.entry is not None, "only what was accepted is cancelled"
        self._world.log(f"{self.spec.request_id} is cancelled by its client")
        assert self.log is not None, "what was accepted has a log"
        self.log.cancelled()
        self.router.cancel(self.entry)

    def _received(self, event: TokenEvent | BatonError) -> None:
        if self.log is None:
            self._start_log()
        log = self.log
        assert log is not None, "it has begun"
        if isinstance(event, BatonError):
            self._world.log(f"{self.spec.request_id} fails: {event.reason}: {event.message}")
            log.failed(event)
            return
        log.received(event.token_ids)
        at = len(log.tokens) - len(event.token_ids)
        expected = self.answer[at : len(log.tokens)]
        assert event.token_ids == expected, (
            f"{self.spec.request_id}: tokens {event.token_ids} at {at}, the oracle says {expected}"
        )
        if event.finish is not None:
            self._world.log(f"{self.spec.request_id} is answered with {len(log.tokens)} tokens")
            log.finished(event.usage.completion_tokens if event.usage is not None else None)
