"""All planted faults, and the happy path that none of them may show in."""

from typing import Final

from mutation.mutant import Edit, Mutant
from mutation.of_blocks import OF_BLOCKS
from mutation.of_leases import OF_LEASES
from mutation.of_requests import OF_REQUESTS

MUTANTS: Final[tuple[Mutant, ...]] = (*OF_BLOCKS, *OF_LEASES, *OF_REQUESTS)

# Beside `make demo`: whole clusters where nothing goes wrong, over both transports and both fronts.
HAPPY_PATH: Final = (
    "tests/e2e/test_handover.py"
    "::test_answers_equal_one_engine_and_second_round_comes_from_the_cache",
    "tests/e2e/test_handover.py::test_every_counter_agrees_with_what_crossed",
    "tests/e2e/test_handover.py::test_a_request_of_one_token_crosses_nothing",
    "tests/e2e/test_handover.py::test_two_of_each_role_share_the_work",
    "tests/e2e/test_handover.py::test_seeded_sampling_equals_one_engine",
    "tests/e2e/test_front.py::test_openai_client_streams_and_completes",
    "tests/e2e/test_front.py::test_grpc_generate_reports_what_happened",
    "tests/e2e/test_cores.py::test_a_request_crosses_and_leaves_nothing",
)

# Planted first, to show that what runs is what was planted: neither the demo nor the happy path may
# overlook it. Blocks that merely change places would not do: keys know their positions.
VISIBLE: Final = Mutant(
    "one-block-for-all",
    "Each read brings its first block again and again.",
    (
        Edit(
            "decode_worker/pull.py",
            "self._handles[span], self._slots[span]",
            "[self._handles[self._cursor]] * (end - self._cursor), self._slots[span]",
        ),
    ),
    HAPPY_PATH,
)
