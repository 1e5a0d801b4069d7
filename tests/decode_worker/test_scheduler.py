"""The decode policy: admission by age, every joined sequence in every step."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.common.ids import RequestKey, TransferId
from baton.decode_worker.scheduler import DecodeScheduler


def key(number: int) -> RequestKey:
    return RequestKey(TransferId(number.to_bytes(16, "big")), 1)


def with_waiting(*accepted: float, seqs: int = 4) -> DecodeScheduler:
    policy = DecodeScheduler(max_num_seqs=seqs)
    for number, accepted_at in enumerate(accepted):
        policy.add(key(number), accepted_at=accepted_at)
    return policy


def admitted_in_turn(policy: DecodeScheduler) -> list[RequestKey]:
    admitted = []
    while (head := policy.head()) is not None:
        policy.admit(head)
        admitted.append(head)
    return admitted


def test_admission_follows_acceptance() -> None:
    policy = with_waiting(5.0, 1.0, 3.0, 1.0)
    assert admitted_in_turn(policy) == [key(1), key(3), key(2), key(0)]


def test_nobody_overtakes_a_head_without_room() -> None:
    policy = with_waiting(1.0, 2.0)
    assert [policy.head() for _ in range(3)] == [key(0)] * 3


def test_a_retry_keeps_its_place() -> None:
    policy = with_waiting(10.0, 20.0)
    policy.add(key(9), accepted_at=15.0)
    assert admitted_in_turn(policy) == [key(0), key(9), key(1)]


def test_pulling_ones_take_places_too() -> None:
    policy = with_waiting(1.0, 2.0, 3.0, seqs=2)
    assert admitted_in_turn(policy) == [key(0), key(1)]
    policy.join(key(1))
    assert policy.head() is None
    policy.remove(key(0))
    assert policy.head() == key(2)


def test_a_sequence_runs_from_its_join_to_its_end() -> None:
    policy = with_waiting(1.0, 2.0)
    admitted_in_turn(policy)
    assert (policy.plan(), policy.pulling()) == ([], [key(0), key(1)])
    policy.join(key(1))
    assert (policy.plan(), policy.pulling()) == ([key(1)], [key(0)])
    policy.join(key(0))
    assert policy.plan() == [key(0), key(1)], "oldest first, whoever joined first"
    policy.remove(key(0))
    assert policy.plan() == [key(1)]


def test_the_youngest_gives_way_and_comes_back_at_its_age() -> None:
    policy = with_waiting(1.0, 2.0, 3.0, seqs=2)
    for joined in admitted_in_turn(policy):
        policy.join(joined)
    assert policy.youngest() == key(1)
    policy.preempt(key(1), accepted_at=2.0)
    assert (policy.plan(), policy.num_admitted) == ([key(0)], 1)
    assert policy.head() == key(1), "ahead of a request that is younger"
    policy.resume(key(1))
    assert (policy.plan(), policy.pulling()) == ([key(0), key(1)], [])


def test_removing_forgets_wherever_it_is() -> None:
    policy = with_waiting(1.0, 2.0, 3.0, seqs=2)
    admitted_in_turn(policy)
    policy.join(key(0))
    for gone in (key(0), key(1), key(2), key(3), key(0)):
        policy.remove(gone)
    assert (policy.num_waiting, policy.num_admitted, policy.num_running) == (0, 0, 0)
    assert policy.head() is None


# (accepted_at, number): sorted, it is the order of age.
Aged = tuple[int, int]


class Policy(RuleBasedStateMachine):
    """Against a model of three lists: nobody is lost, doubled, or overtaken."""

    SEQS = 3

    def __init__(self) -> None:
        super().__init__()
        self.policy = DecodeScheduler(max_num_seqs=self.SEQS)
        self.count = 0
        self.waiting: list[Aged] = []
        self.pulling: list[Aged] = []
        self.running: list[Aged] = []
        self.has_run: set[int] = set()

    @rule(wait=st.integers(0, 2))
    def add(self, wait: int) -> None:
        accepted_at = self.count // 2 + wait
        self.policy.add(key(self.count), accepted_at=float(accepted_at))
        self.waiting.append((accepted_at, self.count))
        self.count += 1

    @precondition(lambda self: self.policy.head() is not None)
    @rule()
    def admit(self) -> None:
        head = next(one for one in self.waiting if key(one[1]) == self.policy.head())
        self.waiting.remove(head)
        if head[1] in self.has_run:
            self.policy.resume(key(head[1]))
            self.running.append(head)
        else:
            self.policy.admit(key(head[1]))
            self.pulling.append(head)

    @precondition(lambda self: self.pulling)
    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.pulling))
        self.policy.join(key(one[1]))
        self.pulling.remove(one)
        self.running.append(one)
        self.has_run.add(one[1])

    @precondition(lambda self: self.running)
    @rule()
    def preempt(self) -> None:
        victim = next(one for one in self.running if key(one[1]) == self.policy.youngest())
        assert victim[0] == max(self.running)[0], "nobody younger runs"
        self.policy.preempt(key(victim[1]), accepted_at=float(victim[0]))
        self.running.remove(victim)
        self.waiting.append(victim)

    @precondition(lambda self: self.count)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, self.count - 1))
        self.policy.remove(key(number))
        for held in (self.waiting, self.pulling, self.running):
            held[:] = [one for one in held if one[1] != number]

    @invariant()
    def it_agrees_with_the_model(self) -> None:
        plan = self.policy.plan()
        assert sorted(plan, key=str) == sorted((key(n) for _, n in self.running), key=str)
        ages = {key(number): accepted_at for accepted_at, number in self.running}
        assert [ages[one] for one in plan] == sorted(ages.values()), "oldest first"
        assert self.policy.pulling() == [key(number) for _, number in self.pulling]
        assert self.policy.num_waiting == len(self.waiting)
        assert self.policy.num_admitted == len(self.pulling) + len(self.running)

    @invariant()
    def the_head_is_as_old_as_any(self) -> None:
        head = self.policy.head()
        has_place = len(self.pulling) + len(self.running) < self.SEQS
        assert (head is not None) == (bool(self.waiting) and has_place)
        if head is not None:
            ages = {key(number): accepted_at for accepted_at, number in self.waiting}
            assert ages[head] == min(ages.values())


Policy.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPolicy = Policy.TestCase
