"""Each error has a reason, a status and a place in the tree that people read."""

import re

import grpc
import pytest

from baton.client import failures
from baton.common import errors
from baton.common.errors import BatonError, InternalError, all_errors, from_reason
from baton.common.status import status_of

ERRORS = all_errors()
# What only a client can meet is defined beside the client.
SHARED = [cls for cls in ERRORS if cls.__module__ != failures.__name__]
DRAWN = re.compile(r"^    (?P<rail>[│ ]*)(?:[├└]── )?(?P<name>[A-Z]\w+)", re.MULTILINE)


def drawn_tree() -> dict[str, str | None]:
    """Class to parent, as the docstring of common/errors.py draws them."""
    assert errors.__doc__ is not None
    parents: dict[str, str | None] = {}
    path: list[str] = []
    for line in DRAWN.finditer(errors.__doc__):
        depth = (line.start("name") - line.start() - 4) // 4
        path[depth:] = [line["name"]]
        parents[line["name"]] = path[depth - 1] if depth else None
    return parents


def test_the_docstring_draws_the_tree_as_it_is() -> None:
    real = {
        cls.__name__: None if cls is BatonError else cls.__bases__[0].__name__ for cls in SHARED
    }
    assert drawn_tree() == real
    assert {cls.__module__ for cls in SHARED} == {errors.__name__}


def test_each_class_has_one_base() -> None:
    assert all(len(cls.__bases__) == 1 for cls in ERRORS)


def test_reasons_are_unique_and_stable_in_form() -> None:
    reasons = [cls.reason for cls in ERRORS]
    assert len(set(reasons)) == len(reasons)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", reason) for reason in reasons)
    assert all("reason" in vars(cls) for cls in ERRORS), "a reason is never inherited"


@pytest.mark.parametrize("cls", ERRORS)
def test_each_error_has_a_status(cls: type[BatonError]) -> None:
    status = status_of(cls)
    assert status == status_of(cls("what happened"))
    assert isinstance(status.grpc, grpc.StatusCode)
    assert status.grpc not in (grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN)
    assert 400 <= status.http < 600
    # OpenAI's clients tell by the type whose fault it is, and retry on 5xx.
    whose = "invalid_request_error" if status.http < 499 else "server_error"
    assert status.kind == whose


@pytest.mark.parametrize("cls", [cls for cls in ERRORS if cls.retryable])
def test_what_may_succeed_elsewhere_says_try_again(cls: type[BatonError]) -> None:
    assert status_of(cls).grpc is grpc.StatusCode.UNAVAILABLE
    assert status_of(cls).http == 503


@pytest.mark.parametrize("cls", ERRORS)
def test_an_error_survives_the_wire_by_its_reason(cls: type[BatonError]) -> None:
    back = from_reason(cls.reason, "what happened")
    assert type(back) is cls
    assert back.message == str(back) == "what happened"


def test_an_unknown_reason_is_an_internal_error_that_names_it() -> None:
    back = from_reason("from_the_future", "what happened")
    assert type(back) is InternalError
    assert back.message == "from_the_future: what happened"


def test_an_error_keeps_what_callers_act_on() -> None:
    error = errors.NoWorker("nobody is ready", field="model", retry_after_s=1.5)
    assert (error.field, error.retry_after_s, error.retryable) == ("model", 1.5, True)
