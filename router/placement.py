"""Which pair, or which worker alone, serves a request: policies behind one small interface."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.common.errors import ExceedsKvCapacity, NoWorker
from baton.common.ids import WorkerIdentity
from baton.common.messages import LoadReport
from baton.common.randomness import Randomness
from baton.common.sampling import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A live worker as placement sees it. `in_flight`: requests that this router has there."""

    identity: WorkerIdentity
    role: Role
    fingerprint: str
    block_size: int
    load: LoadReport
    in_flight: int

    def fits(self, num_tokens: int) -> bool:
        """Whether the whole arena could hold the KV of that many tokens."""
        return -(-num_tokens // self.block_size) <= self.load.blocks_total


Pair = tuple[WorkerIdentity, WorkerIdentity]


@dataclass(frozen=True, slots=True)
class Choice:
    """`decode` is None for a request that ends with its next token.

    `prefill` is None when `decode`, a unified or a decode worker, computes the prompt itself. One
    of them is somebody.
    """

    prefill: WorkerIdentity | None
    decode: WorkerIdentity | None


class Placement(Protocol):
    """A policy. Called on the event loop for each attempt; never blocks, never does I/O."""

    def choose(
        self,
        candidates: Sequence[Candidate],
        *,
        prompt_len: int,
        max_tokens: int,
        excluded: frozenset[WorkerIdentity] = frozenset(),
        excluded_pairs: frozenset[Pair] = frozenset(),
    ) -> Choice:
        """Pick a pair of equal fingerprint, a unified worker, or without a pair one that decodes.

        `prompt_len` counts the tokens that are known, `max_tokens` those that may follow. Nobody of
        `excluded` and no (prefill, decode) of `excluded_pairs` is picked.

        Raises NoWorker when nobody is left, ExceedsKvCapacity when nobody is large enough.
        """
        ...


class LeastLoaded:
    """The worker of each role with the fewest of this router's requests in flight.

    Then the fewest pending prompt tokens or requests by its own report; ties are broken at random.

    The best pair, by the load of its decode worker, and the best unified worker are compared in the
    same way, since both hold a request to its end. Decode workers stand in for the pair where there
    is none. A request for one token goes to a prefill worker, where nothing decodes beside it.
    """

    def __init__(self, randomness: Randomness) -> None:
        self._randomness = randomness

    def choose(
        self,
        candidates: Sequence[Candidate],
        *,
        prompt_len: int,
        max_tokens: int,
        excluded: frozenset[WorkerIdentity] = frozenset(),
        excluded_pairs: frozenset[Pair] = frozenset(),
    ) -> Choice:
        left = [worker for worker in candidates if worker.identity not in excluded]
        prefills = [w for w in left if w.role is Role.PREFILL and w.fits(prompt_len)]
        if max_tokens == 1 and prefills:
            return Choice(self._least(prefills, _prefill_load).identity, None)
        if not any(worker.role.decodes for worker in left):
            raise NoWorker(f"no {_spoken(candidates)} worker is ready", retry_after_s=1.0)
        fitting = _fitting(left, prompt_len + max_tokens - 1)
        decodes = [worker for worker in fitting if worker.role is Role.DECODE]
        unified = [worker for worker in fitting if worker.role is Role.UNIFIED]
        partners = {
            prefill.identity: [
                decode
                for decode in decodes
                if decode.fingerprint == prefill.fingerprint
                and (prefill.identity, decode.identity) not in excluded_pairs
            ]
            for prefill in prefills
        }
        prefills = [prefill for prefill in prefills if partners[prefill.identity]]
        if not prefills:
            return Choice(None, self._least(fitting, _decode_load).identity)
        prefill = self._least(prefills, _prefill_load).identity
        partner = self._least(partners[prefill], _decode_load)
        best = self._least([partner, *unified], _decode_load) if unified else partner
        return Choice(prefill if best is partner else None, best.identity)

    def _least(self, workers: list[Candidate], load: "_Load") -> Candidate:
        return min(workers, key=lambda worker: (load(worker), self._randomness.bits(32)))


class _Load(Protocol):
    def __call__(self, worker: Candidate, /) -> tuple[int, int]: ...


def _prefill_load(worker: Candidate) -> tuple[int, int]:
    return worker.in_flight, worker.load.tokens_pending


def _decode_load(worker: Candidate) -> tuple[int, int]:
    return worker.in_flight, worker.load.requests_running + worker.load.requests_waiting


def _fitting(candidates: Sequence[Candidate], num_tokens: int) -> list[Candidate]:
    """Those that decode and whose arena could hold that many tokens; never none."""
    decoding = [worker for worker in candidates if worker.role.decodes]
    large_enough = [worker for worker in decoding if worker.fits(num_tokens)]
    if not large_enough:
        largest = max(worker.load.blocks_total * worker.block_size for worker in decoding)
        raise ExceedsKvCapacity(
            f"{num_tokens} tokens of KV fit no {_spoken(decoding)} worker; "
            f"the largest holds {largest}"
        )
    return large_enough


def _spoken(candidates: Sequence[Candidate]) -> str:
    """The roles that could end a request in the kind of cluster that these are."""
    roles = {worker.role for worker in candidates}
    if roles == {Role.UNIFIED}:
        return "unified"
    return "decode" if roles and Role.UNIFIED not in roles else "decode or unified"
