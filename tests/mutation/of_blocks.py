"""Faults of slots, generations, fence and caches."""

from mutation.mutant import Edit, Mutant

FENCE = "kvtransfer/fence.py"
OPEN_READS = "kvtransfer/open_reads.py"
ARENA = "engine/arena.py"
ENGINE = "engine/engine.py"

OF_BLOCKS = (
    Mutant(
        "free-on-abort",
        "The targets of a read in flight go to the next request, and the read writes into them.",
        (
            Edit(
                OPEN_READS,
                "            self._quarantined.append(read)\n",
                "            self._pins.unpin(read.slots)\n",
            ),
        ),
        (
            "tests/kvtransfer/test_open_reads.py"
            "::test_a_late_write_of_an_aborted_read_lands_in_nobodys_block",
        ),
    ),
    Mutant(
        "no-quarantine",
        "A read that failed counts as ended, although its transfer may still write.",
        (
            Edit(
                OPEN_READS, "FenceState.FAILED) and not read.pending_slots:", "FenceState.FAILED):"
            ),
        ),
        ("tests/kvtransfer/test_open_reads.py::test_a_read_that_failed_may_still_write",),
    ),
    Mutant(
        "release-as-fence",
        "Letting go of handles ends no transfer; only the end of the agent that posted it does.",
        (
            Edit(
                "kvtransfer/transport/nixl.py",
                "        self._closed = True\n        self._agent.destroy()\n",
                "        self._closed = True\n"
                "        for posted in self._posted.values():\n"
                "            if posted.handle is not None:\n"
                "                self._agent.release(posted.handle)\n",
            ),
        ),
        (
            "tests/kvtransfer/test_transport_contract.py"
            "::test_nixl_close_destroys_the_agent_while_the_reader_is_still_held",
        ),
    ),
    Mutant(
        "skip-generation-check",
        "Whatever was read counts as what was announced.",
        (Edit(FENCE, "if word != handle.generation]", "if word == 0]"),),
        (
            "tests/kvtransfer/test_fence.py::test_a_slot_raised_before_the_read_fails",
            "tests/e2e/test_order.py::test_blocks_that_did_not_pass_their_fence_are_in_no_cache",
        ),
    ),
    Mutant(
        "stale-read-only-logged",
        "A failed fence is noticed, and the request goes on with the bytes.",
        (
            Edit(
                "decode_worker/pull.py",
                "            if state is FenceState.PASSED:\n",
                "            if state is FenceState.PASSED or read.stale:\n",
            ),
        ),
        ("tests/e2e/test_order.py::test_blocks_that_did_not_pass_their_fence_are_in_no_cache",),
    ),
    Mutant(
        "words-with-the-data",
        "Words that are asked for before the data has ended are older than some of the bytes.",
        (
            Edit(
                FENCE,
                "        self.bytes_read += reader.bytes_read\n",
                "        self.bytes_read += reader.bytes_read\n"
                "        self._early = reader.post_generations(self._data.remote_slots)\n"
                "        reader.poll(self._early)\n",
            ),
            Edit(
                FENCE,
                "self._words = self.reader.post_generations(self._data.remote_slots)\n",
                "self._words = self._early\n",
            ),
        ),
        (
            "tests/kvtransfer/test_fence.py"
            "::test_words_are_posted_once_and_only_after_the_data_ended",
            "tests/e2e/test_order.py::test_blocks_that_did_not_pass_their_fence_are_in_no_cache",
        ),
    ),
    Mutant(
        "generation-raised-late",
        "The word moves when the slot is leased or looked at next, after its bytes have changed.",
        (
            Edit(
                ARENA,
                "        np.bitwise_and(np.frombuffer(drawn",
                "        self._due: set[int] = set()\n        np.bitwise_and(np.frombuffer(drawn",
            ),
            Edit(
                ARENA,
                "            self._words[np.asarray(slots, dtype=np.int64)] += np.uint64(1)\n",
                "            self._due.update(slots)\n",
            ),
            Edit(
                ARENA,
                "        return Generation(int(self._words[slot]))\n\n    def words",
                "        self._settle([slot])\n"
                "        return Generation(int(self._words[slot]))\n\n"
                "    def _settle(self, slots):\n"
                "        due = [slot for slot in slots if slot in self._due]\n"
                "        self._due.difference_update(due)\n"
                "        self._words[np.asarray(due, dtype=np.int64)] += np.uint64(1)\n\n"
                "    def words",
            ),
            Edit(
                ARENA,
                "        return self._words[slots]\n",
                "        self._settle(slots.tolist())\n        return self._words[slots]\n",
            ),
        ),
        ("tests/e2e/test_order.py::test_a_slot_that_was_used_again_is_noticed_whoever_used_it",),
    ),
    Mutant(
        "generations-from-zero",
        "The handles of an earlier life of a worker fit the slots of its next one.",
        (Edit(ARENA, "np.uint64((1 << FIRST_GENERATION_BITS) - 1)", "np.uint64(0)"),),
        ("tests/engine/test_arena.py::test_generations_start_at_random_62_bit_numbers",),
    ),
    Mutant(
        "no-retiring-pin",
        "A freed slot is given to a transport before the step that may still write it has ended.",
        (
            Edit(ENGINE, "            self.kv.pin(slots)\n", ""),
            Edit(
                ENGINE,
                "            self.kv.unpin(reversed(slots))\n",
                "            assert slots\n",
            ),
            Edit(
                ENGINE,
                "return [slots for flight in self._flights for slots in flight.written]",
                "return []",
            ),
        ),
        (
            "tests/engine/test_asynchronous_step.py"
            "::test_slots_released_in_flight_are_given_to_nobody_before_collect",
        ),
    ),
    Mutant(
        "announce-at-launch",
        "Blocks are told as readable that the device has not written yet.",
        (
            Edit(
                "prefill_worker/core.py",
                "for entry in plan])\n",
                "for entry in plan])\n"
                "        for entry in plan:\n"
                "            request = self._requests[entry.key]\n"
                "            if request.reader is not None:\n"
                "                size = self._engine.block_size\n"
                "                ends_at = request.sequence.num_launched // size * size\n"
                "                self._owner.readable(request.key, ends_at)\n",
            ),
        ),
        (
            "tests/e2e/test_order.py"
            "::test_nothing_is_readable_before_the_step_that_wrote_it_has_ended",
        ),
    ),
    Mutant(
        "cache-before-computed",
        "A prompt that is cancelled between two chunks leaves unwritten blocks in the cache.",
        (
            Edit(
                "engine/kv_cache.py",
                "num_final = min(num_tokens, sequence.num_computed)",
                "num_final = num_tokens",
            ),
        ),
        (
            "tests/engine/test_block_pool_machine.py"
            "::test_publish_leaves_out_a_block_whose_last_token_was_not_fed",
        ),
    ),
    Mutant(
        "cache-before-fence",
        "Bytes that nobody has checked yet are a hit for the next prompt.",
        (
            Edit(
                "decode_worker/handover.py",
                '        reach("d.after_reserve")\n',
                "        request.sequence.num_computed = status.kv_tokens\n"
                "        self._engine.kv.publish(request.sequence, status.kv_tokens)\n"
                '        reach("d.after_reserve")\n',
            ),
        ),
        ("tests/e2e/test_order.py::test_blocks_that_did_not_pass_their_fence_are_in_no_cache",),
    ),
    Mutant(
        "digests-not-compared",
        "A bit that flips on its way is served as an answer.",
        (
            Edit(
                "worker/integrity.py",
                "        bad = self._table.verify(slots, digests)\n",
                "        bad: list[int] = []\n",
            ),
        ),
        (
            "tests/e2e/test_damage.py"
            "::test_a_flipped_bit_is_found_before_the_join_and_leaves_both_caches",
        ),
    ),
    Mutant(
        "damaged-block-stays-cached",
        "A block that was found wrong poisons every later prompt with its prefix.",
        (
            Edit(
                "worker/integrity.py",
                "        num_dropped = self._prefix.drop(slots)\n",
                "        num_dropped = 0\n",
            ),
        ),
        (
            "tests/e2e/test_damage.py"
            "::test_a_flipped_bit_is_found_before_the_join_and_leaves_both_caches",
        ),
    ),
    Mutant(
        "tenant-not-hashed",
        "One tenant's prompt is a hit for another, who can tell by the time it takes.",
        (
            Edit(
                "common/block_hash.py",
                "digest = blake2b(fingerprint.encode(), digest_size=HASH_BYTES, key=tenant_key)",
                "digest = blake2b(fingerprint.encode(), digest_size=HASH_BYTES)",
            ),
            Edit(
                "common/block_hash.py",
                "blake2b(message, digest_size=HASH_BYTES, key=tenant_key)",
                "blake2b(message, digest_size=HASH_BYTES)",
            ),
        ),
        ("tests/common/test_block_hash.py::test_every_input_decides",),
    ),
    Mutant(
        "salt-ignored",
        "Clients who asked for a cache of their own share it with the rest of their tenant.",
        (
            Edit(
                "router/intake.py",
                "tenant_key(self._tenant_secret, request.cache_salt)",
                "tenant_key(self._tenant_secret, None)",
            ),
        ),
        ("tests/router/test_validation.py::test_a_salt_changes_the_tenant_key_and_nothing_else",),
    ),
)
