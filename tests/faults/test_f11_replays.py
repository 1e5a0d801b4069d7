"""F11: names that clients choose twice, and transfers that come twice, mix nothing up."""

import asyncio
from pathlib import Path

import pytest
from support.core_mesh import GRANT, D, P
from support.faulty_mesh import MeshMaker
from support.trials import prompt_of, trial

from baton.common.ids import RequestKey, WorkerIdentity
from baton.common.messages import DecodeJob, PrefillJob

PROMPT, OTHER = prompt_of(100, 1), prompt_of(90, 2)


async def test_f11_requests_that_share_a_name_are_independent(
    oracle_model: Path, redis_url: str
) -> None:
    """50 at once with one request id: each gets the answer to its own prompt."""
    async with trial(oracle_model, redis_url, prefill=2, decode=2) as run:
        logs = await asyncio.gather(
            *(
                run.ask(prompt_of(30 + 3 * seed, seed), max_tokens=16, request_id="the same")
                for seed in range(50)
            )
        )
        assert {run.report(log).request_id for log in logs} == {"the same"}
        assert [run.report(log).attempts for log in logs] == [1] * 50


@pytest.mark.parametrize("who", [P, D], ids=["P", "D"])
def test_f11_a_transfer_that_is_submitted_twice_stays_the_first_one(
    who: WorkerIdentity, faulty_mesh: MeshMaker
) -> None:
    """While it runs the second submit changes nothing, whatever is in it."""
    mesh = faulty_mesh()
    key = mesh.ask(PROMPT, 12)
    job = PrefillJob(D, GRANT) if who is P else DecodeJob(P, "", GRANT)
    for _ in range(8):
        mesh.send(who, mesh.job(key, OTHER, 12, job))
        mesh.exchange()
    mesh.advance(3)
    # Also after it has ended there.
    assert set(mesh.errors(key)) <= {"already_exists"}
    assert mesh.tokens(key) == mesh.answer(key)
    mesh.expect_rest()


@pytest.mark.parametrize("who", [P, D], ids=["P", "D"])
@pytest.mark.parametrize("attempt", [0, 1], ids=["lower", "ended"])
def test_f11_a_transfer_that_has_ended_is_not_revived(
    attempt: int, who: WorkerIdentity, faulty_mesh: MeshMaker
) -> None:
    """ALREADY_EXISTS for it and for attempts before it; nothing is computed, nothing leased."""
    mesh = faulty_mesh()
    key = mesh.ask(PROMPT, 12)
    mesh.advance(3)
    steps = mesh.engines[who].runner.steps
    again = RequestKey(key.transfer_id, attempt)
    job = PrefillJob(D, GRANT) if who is P else DecodeJob(P, "", GRANT)
    mesh.send(who, mesh.job(again, OTHER, 12, job))
    mesh.advance(1)
    assert mesh.errors(again) == ["already_exists"]
    assert mesh.engines[who].runner.steps == steps
    assert mesh.tokens(key) == mesh.answer(key)
    mesh.expect_rest()
