"""Least-loaded placement: pairs that store KV alike and are large enough, ties at random."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.common.errors import ExceedsKvCapacity, NoWorker
from baton.common.ids import Epoch, WorkerId, WorkerIdentity
from baton.common.messages import LoadReport
from baton.common.randomness import SeededRandomness
from baton.common.sampling import Role
from baton.router.placement import Candidate, LeastLoaded


def worker(
    name: str,
    *,
    fingerprint: str = "same",
    in_flight: int = 0,
    blocks: int = 100,
    pending: int = 0,
    running: int = 0,
) -> Candidate:
    return Candidate(
        identity=WorkerIdentity(WorkerId(name), Epoch(1), name),
        role={"p": Role.PREFILL, "d": Role.DECODE, "u": Role.UNIFIED}[name[0]],
        fingerprint=fingerprint,
        block_size=32,
        load=LoadReport(blocks_total=blocks, tokens_pending=pending, requests_running=running),
        in_flight=in_flight,
    )


def named(name: str) -> WorkerIdentity:
    return worker(name).identity


def chosen(
    *candidates: Candidate,
    prompt_len: int = 10,
    max_tokens: int = 5,
    seed: int = 1,
    excluded: Iterable[str] = (),
    excluded_pairs: Iterable[tuple[str, str]] = (),
) -> tuple[str | None, str | None]:
    choice = LeastLoaded(SeededRandomness(seed)).choose(
        candidates,
        prompt_len=prompt_len,
        max_tokens=max_tokens,
        excluded=frozenset(named(name) for name in excluded),
        excluded_pairs=frozenset((named(p), named(d)) for p, d in excluded_pairs),
    )
    prefill, decode = (
        None if picked is None else picked.worker_id for picked in (choice.prefill, choice.decode)
    )
    return prefill, decode


def test_the_least_loaded_of_each_role_is_taken() -> None:
    assert chosen(
        worker("p0", in_flight=2),
        worker("p1", in_flight=1),
        worker("d0", in_flight=0),
        worker("d1", in_flight=3),
    ) == ("p1", "d0")


def test_what_the_workers_report_breaks_equals() -> None:
    """Other routers' requests are seen in the reports alone."""
    assert chosen(
        worker("p0", pending=500), worker("p1", pending=20), worker("d0", running=9), worker("d1")
    ) == ("p1", "d1")


def test_one_token_needs_no_decode_worker() -> None:
    assert chosen(worker("p0"), max_tokens=1) == ("p0", None)


def test_a_pair_stores_kv_alike() -> None:
    assert chosen(
        worker("p0", fingerprint="new"),
        worker("p1", fingerprint="old", in_flight=5),
        worker("d0", fingerprint="old", in_flight=5),
    ) == ("p1", "d0")


def test_without_a_pair_that_stores_kv_alike_a_decode_worker_serves_alone() -> None:
    assert chosen(worker("p0", fingerprint="new"), worker("d0", fingerprint="old")) == (None, "d0")


def test_without_prefill_workers_a_decode_worker_serves_alone() -> None:
    assert chosen(worker("d0", in_flight=1), worker("d1")) == (None, "d1")
    assert chosen(worker("d0"), max_tokens=1) == (None, "d0")


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ("", "no decode or unified worker"),
        ("p0", "no decode worker"),
        ("p0 d0", "no decode worker"),
        ("u0", "no unified worker"),
        ("p0 d0 u0", "no decode or unified worker"),
    ],
)
def test_a_missing_role_is_named(there: str, said: str) -> None:
    """As the cluster at hand could have it; whoever decodes there is excluded."""
    names = there.split()
    with pytest.raises(NoWorker, match=f"^{said} is ready") as refused:
        chosen(*map(worker, names), excluded=[name for name in names if name != "p0"])
    assert refused.value.retry_after_s is not None


def test_the_excluded_are_not_picked() -> None:
    everybody = [worker(name) for name in ("p0", "p1", "d0", "d1")]
    assert chosen(*everybody, excluded=["p0", "d1"]) == ("p1", "d0")
    assert chosen(*everybody, excluded=["p0", "p1", "d1"]) == (None, "d0")
    with pytest.raises(NoWorker):
        chosen(*everybody, excluded=["d0", "d1"])


def test_an_excluded_worker_is_one_life_not_a_name() -> None:
    again = replace(worker("d0"), identity=WorkerIdentity(WorkerId("d0"), Epoch(2), "d0"))
    assert chosen(worker("p0"), again, excluded=["d0"]) == ("p0", "d0")


def test_an_excluded_pair_leaves_both_to_others() -> None:
    everybody = [worker("p0"), worker("p1", in_flight=9), worker("d0")]
    assert chosen(*everybody) == ("p0", "d0")
    assert chosen(*everybody, excluded_pairs=[("p0", "d0")]) == ("p1", "d0")
    assert chosen(*everybody, excluded_pairs=[("p0", "d0"), ("p1", "d0")]) == (None, "d0")


def test_only_workers_that_are_large_enough_are_asked() -> None:
    assert chosen(
        worker("p0", blocks=1), worker("p1", in_flight=7), worker("d0"), prompt_len=33
    ) == ("p1", "d0")


def test_the_prompt_counts_on_p_and_the_whole_request_on_d() -> None:
    """The last output token is never fed, so 32 + 33 - 1 tokens fill two blocks of 32."""
    exact = (worker("p0", blocks=1), worker("d0", blocks=2))
    assert chosen(*exact, prompt_len=32, max_tokens=33) == ("p0", "d0")
    assert chosen(*exact, prompt_len=33, max_tokens=32) == (None, "d0"), "P is too small"
    with pytest.raises(ExceedsKvCapacity, match=r"65 tokens of KV fit no decode worker.* 64"):
        chosen(*exact, prompt_len=32, max_tokens=34)


def test_unified_workers_serve_alone() -> None:
    assert chosen(worker("u0", in_flight=1), worker("u1")) == (None, "u1")
    assert chosen(worker("u0", running=3), worker("u1"), max_tokens=1) == (None, "u1")
    assert chosen(worker("u0"), worker("u1", in_flight=9), excluded=["u0"]) == (None, "u1")


def test_the_idler_of_a_pair_and_a_unified_worker_is_taken() -> None:
    """The pair counts by its decode worker: that is where a request stays."""
    busy_prefill = worker("p0", in_flight=9)
    for decodes, unified, expected in (
        ((1, 4), 2, ("p0", "d0")),
        ((3, 4), 2, (None, "u0")),
        ((3, 0), 2, ("p0", "d1")),
    ):
        assert (
            chosen(
                busy_prefill,
                worker("d0", in_flight=decodes[0]),
                worker("d1", in_flight=decodes[1]),
                worker("u0", in_flight=unified),
                worker("u1", in_flight=7),
            )
            == expected
        )
    assert chosen(worker("p0"), worker("d0", running=2), worker("u0", running=1)) == (None, "u0")


def test_one_token_goes_to_p_where_there_is_one() -> None:
    everybody = [worker("p0", in_flight=9), worker("d0"), worker("u0")]
    assert chosen(*everybody, max_tokens=1) == ("p0", None)
    assert chosen(*everybody, max_tokens=1, excluded=["p0", "d0"]) == (None, "u0")


def test_without_a_pair_decode_and_unified_workers_share_the_work() -> None:
    prefill = worker("p0", fingerprint="new")
    assert chosen(prefill, worker("d0", in_flight=1), worker("u0")) == (None, "u0")
    assert chosen(prefill, worker("d0"), worker("u0", in_flight=1)) == (None, "d0")


def test_what_is_excluded_of_a_pair_leaves_the_unified_worker() -> None:
    everybody = [worker("p0"), worker("d0"), worker("u0", in_flight=1)]
    assert chosen(*everybody) == ("p0", "d0")
    assert chosen(*everybody, excluded=["d0"]) == (None, "u0")
    assert chosen(*everybody, excluded=["u0"]) == ("p0", "d0")
    with pytest.raises(NoWorker):
        chosen(*everybody, excluded=["d0", "u0"])


def test_a_unified_worker_never_makes_a_pair() -> None:
    """Its prompt would cross for nothing."""
    assert chosen(worker("p0"), worker("u0")) == (None, "u0")


def test_the_whole_request_counts_on_a_unified_worker() -> None:
    small = (worker("p0"), worker("d0", blocks=2), worker("u0", blocks=3, in_flight=9))
    assert chosen(*small, prompt_len=32, max_tokens=33) == ("p0", "d0")
    assert chosen(*small, prompt_len=32, max_tokens=34) == (None, "u0"), "D is too small"
    with pytest.raises(ExceedsKvCapacity, match=r"97 .* fit no decode or unified worker.* 96$"):
        chosen(*small, prompt_len=32, max_tokens=66)
    with pytest.raises(ExceedsKvCapacity, match=r"97 .* fit no unified worker.* 96$"):
        chosen(small[2], prompt_len=32, max_tokens=66)


def test_equals_share_the_work() -> None:
    workers = [worker(name) for name in ("p0", "p1", "d0", "d1")]
    picked = Counter(chosen(*workers, seed=seed) for seed in range(200))
    assert len(picked) == 4
    assert min(picked.values()) > 20
    unified = [*workers, worker("u0"), worker("u1")]
    picked = Counter(chosen(*unified, seed=seed)[1] for seed in range(200))
    assert picked.keys() == {"d0", "d1", "u0", "u1"}
    assert min(picked.values()) > 20


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 500)), min_size=1, max_size=6),
    st.integers(0, 2**32),
)
def test_nobody_idler_was_passed_over(loads: list[tuple[int, int]], seed: int) -> None:
    prefills = [
        worker(f"p{index}", in_flight=in_flight, pending=pending)
        for index, (in_flight, pending) in enumerate(loads)
    ]
    name, _ = chosen(*prefills, worker("d0"), seed=seed)
    assert name is not None
    assert loads[int(name[1:])] == min(loads)
