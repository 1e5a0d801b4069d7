"""A later attempt goes on where the earlier one stopped: tokens, draws, penalties, hand-overs."""

from pathlib import Path
from typing import Any

import pytest
from support.core_mesh import GRANT, ROUTER, CoreMesh, D, P

from baton.common.ids import RequestKey, TransferId
from baton.common.messages import Cancel, DecodeJob, LiveRequest, PrefillJob
from baton.worker.core import RouterAttached, RouterPaused, RouterResumed

PROMPT = list(range(10, 140))
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 7},
    {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.3, "presence_penalty": 0.4},
    {"frequency_penalty": 0.6, "min_tokens": 10, "ignore_eos": False},
]


def key_of(number: int, attempt: int) -> RequestKey:
    return RequestKey(TransferId(number.to_bytes(16, "big")), attempt)


def run(
    mesh: CoreMesh, key: RequestKey, output: list[int], sampling: dict[str, Any], *, local: bool
) -> list[int]:
    """One attempt to its end."""
    if local:
        mesh.send(D, mesh.job(key, PROMPT, 40, DecodeJob(None), output=output, **sampling))
    else:
        prefill, decode = PrefillJob(D, GRANT), DecodeJob(P, "nowhere", GRANT)
        mesh.send(P, mesh.job(key, PROMPT, 40, prefill, output=output, **sampling))
        mesh.send(D, mesh.job(key, PROMPT, 40, decode, output=output, **sampling))
    mesh.advance(6)
    assert mesh.errors(key) == []
    mesh.expect_rest()
    return mesh.tokens(key, output)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("is_local", [False, True])
def test_an_attempt_continues_the_sequence_of_the_one_before(
    sampling: dict[str, Any], is_local: bool, tiny_llama: Path
) -> None:
    mesh = CoreMesh(tiny_llama)
    whole = run(mesh, key_of(1, 1), [], sampling, local=False)
    assert len(whole) == 40
    for count in (1, 7, 32, 39):
        resumed = run(CoreMesh(tiny_llama), key_of(2, 2), whole[:count], sampling, local=is_local)
        assert resumed == whole, f"after {count} tokens"


def test_an_attempt_pulls_what_its_owner_had_cached(tiny_llama: Path) -> None:
    """Recovery is cheap: the owner computes the emitted tokens, not the prompt."""
    mesh = CoreMesh(tiny_llama)
    whole = run(mesh, key_of(1, 1), [], {}, local=False)
    before = mesh.engines[P].runner.tokens_forwarded
    assert run(mesh, key_of(1, 2), whole[:20], {}, local=False) == whole
    assert mesh.engines[P].runner.tokens_forwarded - before <= 20 + 32


def test_a_local_request_reports_its_prefill(tiny_llama: Path) -> None:
    mesh = CoreMesh(tiny_llama)
    run(mesh, key_of(1, 1), [], {}, local=True)
    first = mesh.records[0]
    assert first.prefill is not None
    assert first.handover is None
    assert (first.prefill.cached_tokens, first.prefill.computed_tokens) == (0, len(PROMPT))


def test_more_output_than_was_asked_for_is_refused(tiny_llama: Path) -> None:
    mesh = CoreMesh(tiny_llama)
    key = key_of(1, 2)
    mesh.send(P, mesh.job(key, PROMPT, 4, PrefillJob(None), output=[1, 2, 3, 4]))
    mesh.advance(0.2)
    assert mesh.errors(key) == ["invalid_request"]


def test_the_last_token_needs_no_reader(tiny_llama: Path) -> None:
    mesh = CoreMesh(tiny_llama)
    whole = run(mesh, key_of(1, 1), [], {}, local=False)
    key = key_of(1, 2)
    mesh.send(P, mesh.job(key, PROMPT, 40, PrefillJob(None), output=whole[:39]))
    mesh.advance(1)
    (record,) = [record for record in mesh.records if record.key == key]
    assert (record.position, record.tokens) == (39, (whole[39],))
    assert record.finish is not None
    mesh.expect_rest()


@pytest.mark.parametrize("position", [0, 1, 12])
def test_a_router_that_attaches_anew_gets_what_it_lacks(position: int, tiny_llama: Path) -> None:
    mesh = CoreMesh(tiny_llama)
    whole = run(mesh, key_of(100, 1), [], {}, local=False)
    key = mesh.submit(PROMPT, 40)
    while len(mesh.tokens(key)) < 12:
        mesh.exchange()
    mesh.records.clear()
    for core in mesh.cores.values():
        core.handle(RouterAttached(ROUTER, (LiveRequest(key, position),)))
    mesh.advance(8)
    assert [r.handover is not None for r in mesh.records if r.key == key].count(True) == 1
    assert mesh.tokens(key, whole[:position]) == whole
    mesh.expect_rest()


def test_what_a_router_does_not_name_is_aborted(tiny_llama: Path) -> None:
    mesh = CoreMesh(tiny_llama)
    key = mesh.submit(PROMPT, 40)
    mesh.advance(0.5)
    for core in mesh.cores.values():
        core.handle(RouterAttached(ROUTER, ()))
    mesh.advance(0.2)
    assert mesh.errors(key) == ["worker_lost"]
    mesh.expect_rest()


def test_a_paused_router_stops_its_own_sequences_alone(tiny_llama: Path) -> None:
    mesh = CoreMesh(tiny_llama)
    key = mesh.submit(PROMPT, 40)
    while len(mesh.tokens(key)) < 5:
        mesh.exchange()
    mesh.decode.handle(RouterPaused(ROUTER))
    mesh.advance(2)
    held = len(mesh.tokens(key))
    assert held <= 6
    mesh.decode.handle(RouterResumed(ROUTER))
    mesh.advance(6)
    assert len(mesh.tokens(key)) == 40
    mesh.expect_rest()


def test_a_late_cancel_of_the_first_attempt_does_not_touch_the_second(tiny_llama: Path) -> None:
    mesh = CoreMesh(tiny_llama)
    whole = run(mesh, key_of(1, 1), [], {}, local=False)
    second = key_of(1, 2)
    mesh.send(P, mesh.job(second, PROMPT, 40, PrefillJob(D, GRANT), output=whole[:5]))
    mesh.send(D, mesh.job(second, PROMPT, 40, DecodeJob(P, "", GRANT), output=whole[:5]))
    mesh.exchange()
    for worker in (P, D):
        mesh.send(worker, Cancel(key_of(1, 1)))
    mesh.advance(6)
    assert mesh.tokens(second, whole[:5]) == whole
    mesh.expect_rest()
