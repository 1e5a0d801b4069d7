"""Faults of attempts: who is heard, what is said again, what is cleaned up, when it ends."""

from mutation.mutant import Edit, Mutant

DISPATCH = "router/dispatch.py"
ASSIGNMENT = "router/assignment.py"
RECOVERY = "router/recovery.py"

OF_REQUESTS = (
    Mutant(
        "dedupe-by-client-id",
        "Two requests that their clients gave one name are one, and one client waits for ever.",
        (
            Edit(
                DISPATCH,
                "        self._assigner.begin(entry)\n        self._journal.add(entry)\n",
                "        for older in self._journal:\n"
                "            if older.spec.request_id == spec.request_id:\n"
                "                return older\n"
                "        self._assigner.begin(entry)\n        self._journal.add(entry)\n",
            ),
        ),
        (
            "tests/router/test_client_ids.py::test_fifty_requests_of_one_name_are_fifty_requests",
            "tests/router/test_client_ids.py::test_a_cancel_takes_one_of_two_requests_of_one_name",
        ),
    ),
    Mutant(
        "first-token-twice",
        "Both workers send the first token; only its position tells that it is one.",
        (
            Edit(
                DISPATCH,
                "        fresh = record.tokens[entry.num_emitted - record.position :]\n",
                "        fresh = record.tokens\n"
                "        if record.handover is not None:\n"
                "            fresh = fresh[1:]\n",
            ),
        ),
        ("tests/router/test_dispatch.py::test_a_join_may_overtake_the_prefill_workers_word",),
    ),
    Mutant(
        "retry-without-the-emitted",
        "The next attempt starts from the prompt: all is computed again, and need not be the same.",
        (Edit(ASSIGNMENT, "output_tokens=entry.tokens.tolist()", "output_tokens=[]"),),
        (
            "tests/router/test_foreign_frames.py"
            "::test_every_worker_of_a_retry_is_given_all_that_was_emitted",
        ),
    ),
    Mutant(
        "boundary-moved",
        "Emitted tokens count as prompt: draws, penalties and limits start anew.",
        (
            Edit(
                "engine/engine.py",
                "            prompt_len=len(prompt),\n",
                "            prompt_len=len(prompt) + len(list(output)),\n",
            ),
        ),
        ("tests/engine/test_asynchronous_step.py::test_a_resumed_run_equals_an_uninterrupted_one",),
    ),
    Mutant(
        "late-clean-up-unfenced",
        "A late cancel of the first attempt ends the second.",
        (
            Edit(
                "worker/intake.py",
                "        request = self.requests.get(key)\n",
                "        live = self.requests.values()\n"
                "        same = (r for r in live if r.key.transfer_id == key.transfer_id)\n"
                "        request = next(same, None)\n",
            ),
        ),
        (
            "tests/e2e/test_attempts.py"
            "::test_a_late_cancel_of_the_first_attempt_does_not_touch_the_second",
        ),
    ),
    Mutant(
        "endings-forgotten",
        "A submit that comes after its cancel starts work for nobody.",
        (
            Edit(
                "kvtransfer/endings.py",
                "return entry is not None and key.attempt <= entry[0]\n",
                "return entry is not None and key.attempt < 0\n",
            ),
        ),
        ("tests/worker/test_intake.py::test_a_cancel_that_overtakes_its_submit_wins",),
    ),
    Mutant(
        "cancel-dropped",
        "Workers that were left go on: their blocks are held until a deadline.",
        (
            Edit(
                ASSIGNMENT,
                "                self._send(worker, Cancel(attempt.key))\n",
                "                continue\n",
            ),
        ),
        ("tests/router/test_dispatch.py::test_a_cancel_says_nothing_more",),
    ),
    Mutant(
        "strangers-heard",
        "Tokens of a worker that was left, or of its next life, reach the client.",
        (
            Edit(
                DISPATCH,
                "record.key != attempt.key or worker not in attempt.workers:",
                "record.key != attempt.key:",
            ),
        ),
        ("tests/router/test_dispatch.py::test_records_of_strangers_are_ignored",),
    ),
    Mutant(
        "anybody-wins-a-move",
        "The higher attempt is taken for the current one on the word of a worker not of it.",
        (
            Edit(
                DISPATCH,
                "record.key == move.attempt.key and worker == move.target:",
                "record.key == move.attempt.key:",
            ),
        ),
        ("tests/router/test_foreign_frames.py::test_nobody_but_its_target_wins_a_move",),
    ),
    Mutant(
        "ended-submitted-again",
        "The finish is lost with its worker, and an answer that is whole is computed on.",
        (Edit(DISPATCH, "finish = entry.natural_end()", "finish = None"),),
        ("tests/router/test_recovery.py::test_a_journal_that_ends_is_not_submitted_again",),
    ),
    Mutant(
        "time-starts-again",
        "A retry has the whole time of its request once more, whatever its client thinks.",
        (Edit(ASSIGNMENT, "time_left_s=spec.timeout_s - age_s", "time_left_s=spec.timeout_s"),),
        (
            "tests/router/test_recovery.py"
            "::test_the_new_attempt_goes_out_at_once_and_its_time_is_what_is_left",
        ),
    ),
    Mutant(
        "third-victim",
        "A request that kills whoever runs it goes from worker to worker.",
        (
            Edit(
                RECOVERY,
                "return max(entry.history.crashes.values(), default=0) >= MAX_CRASHES",
                "return False",
            ),
        ),
        (
            "tests/router/test_recovery.py"
            "::test_a_request_that_kills_whoever_decodes_it_gets_no_third_one",
        ),
    ),
    Mutant(
        "retries-without-budget",
        "When many attempts fail, trying all of them again is what keeps them failing.",
        (
            Edit(
                RECOVERY,
                "            return False\n        self._spent.append(now)\n",
                "            return True\n        self._spent.append(now)\n",
            ),
        ),
        (
            "tests/router/test_recovery.py"
            "::test_the_first_recovery_is_free_and_the_others_share_a_budget",
        ),
    ),
    Mutant(
        "router-lost-unnoticed",
        "Workers compute on for a router that is gone.",
        (
            Edit(
                "worker/control.py",
                "        self._post(RouterGone(router_id))\n",
                '        log.info("%s is gone", RouterGone(router_id))\n',
            ),
        ),
        (
            "tests/worker/test_control.py"
            "::test_a_router_that_stays_away_is_gone_and_one_that_returns_is_not",
        ),
    ),
)
