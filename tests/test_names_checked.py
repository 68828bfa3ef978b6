"""No public call takes an operator for a name, or anything but a whole number for a version."""

from __future__ import annotations

from typing import Any

import pytest

from mongotorch import Datalayer
from mongotorch.errors import IdentifierError, ParameterError
from tests.helpers import documents_in, fill, model, trainer

OPERATORS: list[Any] = [
    {"$gt": ""},
    {"$ne": None},
    {"$regex": "."},
    ["m"],
    1,
    True,
    b"m",
    "m\0",
    "\ud800",
    "x" * 10**6,
]
NUMBERS: list[Any] = [{"$gte": 0}, True, 1.0, "1", [1], float("nan"), 2**70]


@pytest.mark.parametrize("bad", OPERATORS, ids=[ascii(each)[:12] for each in OPERATORS])
def test_no_call_takes_an_operator_for_a_name(db: Datalayer, bad: Any) -> None:
    db.apply(trainer(fill(db), max_iterations=1))
    before = documents_in(db)
    calls: list[Any] = [
        lambda: db.load(bad, "m"),
        lambda: db.load("model", bad),
        lambda: db.load("model", "m", alias=bad),
        lambda: db.load(uuid=bad),
        lambda: db.show(bad),
        lambda: db.show("model", bad),
        lambda: db.show(uuid=bad),
        lambda: db.remove(bad, "m"),
        lambda: db.remove("model", bad),
        lambda: db.remove("model", bad, force=True),
        lambda: db.promote("model", bad),
        lambda: db.promote("model", "m", alias=bad),
        lambda: db.promote("model", "m", uuid=bad),
        lambda: db.rollback("model", bad),
        lambda: db.history("model", bad),
        lambda: db.live("model", bad),
        lambda: db.job(bad),
        lambda: db.jobs(status=bad),
        lambda: db.jobs(identifier=bad),
        lambda: db.diff(bad, bad),
        lambda: db.reproduce(bad),
        lambda: db.trained_on(1, bad),
        lambda: db.pause(bad),
        lambda: db.resume(bad),
        lambda: db.fire(bad),
    ]
    for number, call in enumerate(calls):
        with pytest.raises(IdentifierError) as caught:
            call()
        assert caught.value.field, number
    assert documents_in(db) == before


@pytest.mark.parametrize("bad", NUMBERS, ids=[ascii(each)[:12] for each in NUMBERS])
def test_no_call_takes_an_operator_for_a_version(db: Datalayer, bad: Any) -> None:
    db.apply(model())
    calls: list[Any] = [
        lambda: db.load("model", "m", bad),
        lambda: db.show("model", "m", bad),
        lambda: db.remove("model", "m", bad),
        lambda: db.remove("model", "m", bad, force=True),
        lambda: db.promote("model", "m", bad),
        lambda: db.jobs(limit=bad),
    ]
    for call in calls:
        with pytest.raises(ParameterError):
            call()
    assert db.show("model", "m") == [0]


def test_a_name_that_has_to_be_given_is_not_none(db: Datalayer) -> None:
    db.apply(model())
    missing: Any = None
    for call in (lambda: db.remove("model", missing), lambda: db.rollback(missing, "m"), lambda: db.job(missing)):
        with pytest.raises(IdentifierError):
            call()
