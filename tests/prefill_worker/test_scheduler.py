"""The prefill policy: oldest first, within the budget, and everybody's turn comes."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from baton.common.ids import RequestKey, TransferId
from baton.prefill_worker.scheduler import PlannedChunk, PrefillScheduler


def key(number: int) -> RequestKey:
    return RequestKey(TransferId(number.to_bytes(16, "big")), 1)


def scheduler(*, budget: int = 10, seqs: int = 4) -> PrefillScheduler:
    return PrefillScheduler(max_num_batched_tokens=budget, max_num_seqs=seqs)


def admit_all(policy: PrefillScheduler, lengths: dict[RequestKey, int]) -> list[RequestKey]:
    """Admit while there are places, as a core with room for everybody does."""
    admitted = []
    while (head := policy.head()) is not None:
        policy.admit(head, num_tokens=lengths[head])
        admitted.append(head)
    return admitted


def test_a_step_fills_its_budget_oldest_first() -> None:
    policy = scheduler()
    for number in range(3):
        policy.add(key(number), accepted_at=float(number))
    admit_all(policy, {key(0): 4, key(1): 9, key(2): 5})
    assert policy.plan() == [PlannedChunk(key(0), 4), PlannedChunk(key(1), 6)]


def test_a_long_prompt_takes_several_steps_and_ends_once() -> None:
    policy = scheduler()
    policy.add(key(1), accepted_at=0.0)
    policy.admit(key(1), num_tokens=23)
    sizes, ends = [], []
    while plan := policy.plan():
        (chunk,) = plan
        sizes.append(chunk.num_tokens)
        ends.append(policy.computed(chunk))
    assert (sizes, ends) == ([10, 10, 3], [False, False, True])
    assert (policy.num_running, policy.num_waiting) == (0, 0)


def test_waiting_prompts_are_ordered_by_acceptance() -> None:
    policy = scheduler()
    for number, accepted_at in enumerate([5.0, 1.0, 3.0, 1.0]):
        policy.add(key(number), accepted_at=accepted_at)
    assert list(policy.waiting()) == [key(1), key(3), key(2), key(0)], "equals stay in order"


def test_nobody_overtakes_a_head_without_room() -> None:
    policy = scheduler()
    policy.add(key(1), accepted_at=1.0)
    policy.add(key(2), accepted_at=2.0)
    assert [policy.head() for _ in range(3)] == [key(1)] * 3
    policy.add(key(0), accepted_at=0.0)
    assert policy.head() == key(0), "a retry keeps its place"


def test_no_more_run_than_there_are_places() -> None:
    policy = scheduler(seqs=2)
    for number in range(3):
        policy.add(key(number), accepted_at=float(number))
    assert admit_all(policy, dict.fromkeys(map(key, range(3)), 5)) == [key(0), key(1)]
    assert policy.head() is None
    policy.remove(key(0))
    assert policy.head() == key(2)


def test_removing_forgets_wherever_it_is() -> None:
    policy = scheduler()
    policy.add(key(1), accepted_at=1.0)
    policy.add(key(2), accepted_at=2.0)
    policy.admit(key(1), num_tokens=5)
    for gone in (key(1), key(2), key(3), key(1)):
        policy.remove(gone)
    assert (policy.head(), policy.plan(), policy.num_running) == (None, [], 0)


prompts = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), min_size=1, max_size=12)


@given(prompts, st.integers(1, 16), st.integers(1, 4))
def test_every_prompt_is_computed_once_and_in_order(
    prompts: list[tuple[int, int]], budget: int, seqs: int
) -> None:
    policy = scheduler(budget=budget, seqs=seqs)
    lengths = {key(number): length for number, (_, length) in enumerate(prompts)}
    for number, (accepted_at, _) in enumerate(prompts):
        policy.add(key(number), accepted_at=float(accepted_at))
    expected = list(policy.waiting())
    computed: Counter[RequestKey] = Counter()
    admitted, ended = [], []
    while True:
        admitted += admit_all(policy, lengths)
        assert policy.num_running <= seqs
        plan = policy.plan()
        if not plan:
            break
        assert sum(chunk.num_tokens for chunk in plan) <= budget
        assert all(chunk.num_tokens >= 1 for chunk in plan)
        for chunk in plan:
            computed[chunk.key] += chunk.num_tokens
            if policy.computed(chunk):
                ended.append(chunk.key)
    assert admitted == ended == expected
    assert computed == lengths


@given(st.integers(1, 8), st.lists(st.integers(1, 30), min_size=1, max_size=30))
def test_newcomers_starve_nobody(budget: int, newcomers: list[int]) -> None:
    """One newcomer per step, for ever: the first prompt still ends after its own steps."""
    policy = scheduler(budget=budget, seqs=4)
    lengths = {key(0): 20, **{key(n): length for n, length in enumerate(newcomers, start=1)}}
    policy.add(key(0), accepted_at=0.0)
    for step in range(-(-20 // budget)):
        if step < len(newcomers):
            policy.add(key(step + 1), accepted_at=1.0 + step)
        admit_all(policy, lengths)
        plan = policy.plan()
        assert plan[0].key == key(0)
        ended = [chunk.key for chunk in plan if policy.computed(chunk)]
    assert key(0) in ended
