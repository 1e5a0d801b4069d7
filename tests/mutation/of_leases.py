"""Faults of leases, grants, identities, and of the order in which space is taken."""

from mutation.mutant import Edit, Mutant

LEDGER = "kvtransfer/ledger.py"
OWNER = "kvtransfer/owner.py"
HANDOVER = "decode_worker/handover.py"
DECODE = "decode_worker/core.py"

OF_LEASES = (
    Mutant(
        "sweep-stops-early",
        "Leases are not in the order of their ends: one that was renewed shelters all behind it.",
        (
            Edit(
                LEDGER,
                "        over = [lease for lease in self._leases.values() "
                "if now >= lease.ends_at()]\n",
                "        over = []\n"
                "        for lease in self._leases.values():\n"
                "            if now < lease.ends_at():\n"
                "                break\n"
                "            over.append(lease)\n",
            ),
        ),
        ("tests/kvtransfer/test_ledger.py::test_one_sweep_ends_all_whose_time_has_come",),
    ),
    Mutant(
        "renewal-revives",
        "A renewal that comes between the end and its sweep brings an expired lease back.",
        (Edit(LEDGER, "        if now >= lease.ends_at():\n            return False\n", ""),),
        ("tests/kvtransfer/test_ledger.py::test_an_expired_lease_is_not_revived_before_its_sweep",),
    ),
    Mutant(
        "link-revives",
        "A reader that comes back after its grace finds its leases open again.",
        (
            Edit(
                LEDGER,
                "if lease.reader == reader and now < lease.ends_at():",
                "if lease.reader == reader:",
            ),
        ),
        (
            "tests/kvtransfer/test_ledger.py"
            "::test_a_reader_that_comes_back_after_the_grace_revives_nothing",
        ),
    ),
    Mutant(
        "long-step-ends-leases",
        "Time in which the owner could neither tell nor hear anything counts against its readers.",
        (
            Edit(
                "prefill_worker/core.py",
                "self._owner.forgive(self._pace.lost_s(now))",
                "self._pace.lost_s(now)",
            ),
        ),
        ("tests/e2e/test_order.py::test_a_step_longer_than_a_lease_costs_no_lease",),
    ),
    Mutant(
        "not-yet-is-gone",
        "A reader whose message is faster than the router's is told that its lease is lost.",
        (
            Edit(
                OWNER,
                "if is_offered or not self._endings.has_ended(key):",
                "if is_offered:",
            ),
        ),
        (
            "tests/kvtransfer/test_owner.py"
            "::test_a_renewal_of_what_is_not_known_yet_is_never_answered_gone",
        ),
    ),
    Mutant(
        "anybody-releases",
        "A worker ends the lease of another one, whose blocks are evicted under its read.",
        (Edit(OWNER, "if offer is None or offer.reader != reader:", "if offer is None:"),),
        ("tests/kvtransfer/test_owner.py::test_a_stranger_releases_nothing",),
    ),
    Mutant(
        "grant-not-checked",
        "Whoever knows a transfer id is told where its blocks lie.",
        (
            Edit(
                OWNER,
                "return offer.reader == reader and compare_digest(mac, expected)",
                "return bool(expected)",
            ),
        ),
        (
            "tests/kvtransfer/test_owner.py::test_nobody_else_learns_a_handle",
            "tests/e2e/test_grants.py::test_a_reader_with_another_grant_is_told_no_handle",
        ),
    ),
    Mutant(
        "handles-not-checked",
        "Handles that were changed on their way are read: those of another request, perhaps.",
        (Edit(HANDOVER, "if compare_digest(status.mac, expected):", "if expected:"),),
        ("tests/e2e/test_grants.py::test_forged_handles_are_not_read",),
    ),
    Mutant(
        "identity-by-name",
        "A worker that was started again under its name and port passes for the one before.",
        (
            Edit(
                "common/ids.py",
                "from dataclasses import dataclass\n",
                "from dataclasses import dataclass, field\n",
            ),
            Edit(
                "common/ids.py",
                "    epoch: Epoch\n    incarnation: str\n",
                "    epoch: Epoch = field(compare=False)\n"
                "    incarnation: str = field(compare=False)\n",
            ),
        ),
        ("tests/kvtransfer/test_links.py::test_another_incarnation_at_the_address_is_refused",),
    ),
    Mutant(
        "reserve-before-lease",
        "A reader that holds its space while it waits for the owner's waits in a circle.",
        (
            Edit(
                DECODE,
                "            self.handovers.start(request)\n",
                "            self.handovers.start(request)\n"
                "            num_tokens = len(sequence.tokens)\n"
                "            self._engine.kv.reserve(sequence, num_tokens, num_tokens)\n",
            ),
            Edit(
                DECODE,
                "            if not self._engine.kv.reserve(sequence, num_tokens, limit):\n",
                "            if not sequence.slots and not self._engine.kv.reserve(\n"
                "                sequence, num_tokens, limit\n"
                "            ):\n",
            ),
        ),
        (
            "tests/e2e/test_order.py::test_who_waits_for_a_lease_holds_nothing",
            "tests/e2e/test_order.py::test_prompts_that_fill_both_pools_do_not_wait_in_a_circle",
        ),
    ),
    Mutant(
        "hits-pinned-while-waiting",
        "Those who wait for room hold cached blocks that would be the room for the first of them.",
        (
            Edit(
                HANDOVER,
                "            request.state = DecodeState.QUEUED\n",
                "            request.state = DecodeState.QUEUED\n"
                "            kv = self._engine.kv\n"
                "            num_hit = kv.num_hits(sequence, merged.kv_tokens) * kv.block_size\n"
                "            kv.reserve(sequence, num_hit, num_hit)\n",
            ),
            Edit(
                DECODE,
                "            # The reservation may find fewer hits than it looked for: "
                "damaged blocks are none.\n",
                "            self._engine.kv.release(sequence)\n",
            ),
        ),
        ("tests/e2e/test_order.py::test_who_waits_for_room_holds_not_even_its_hits",),
    ),
    Mutant(
        "stay-keeps-the-word",
        "A source that goes on writes into a block that its target may still be reading.",
        (
            Edit(
                "decode_worker/moving.py",
                "self._engine.generations.raise_words([last])",
                "assert last >= 0",
            ),
        ),
        (
            "tests/e2e/test_moves.py"
            "::test_the_block_that_was_shown_is_disowned_before_it_is_written",
        ),
    ),
)
