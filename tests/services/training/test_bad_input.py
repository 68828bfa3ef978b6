"""Bad input: one typed error that names the cause, a failed job, and no version beyond the untrained one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.helpers import documents_in, fill, fold_ids, model, net, points, same, state, trainer
from torch import Tensor, nn

from mongotorch import Datalayer, Dataset, Metric, MongotorchError, Query, Validation
from mongotorch.errors import (
    DataError,
    EmptyFoldError,
    EmptySelectError,
    FieldMissingError,
    FoldMissingError,
    NonFiniteLossError,
    OptimizerError,
    ParameterError,
    ShapeError,
    SignatureError,
)

Spoil = Callable[[Datalayer], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is spoiled, what is asked for, and what the error has to say."""

    error: type[MongotorchError]
    spoil: Spoil = lambda db: None
    given: dict[str, Any] = dataclasses.field(default_factory=dict)
    field: str | None = None
    document: int | str | None = None
    words: str | None = None


def change(number: int, **values: Any) -> Spoil:
    return lambda db: db["points"].raw.update_one({"_id": number}, {"$set": values})


def unset(number: int, field: str) -> Spoil:
    return lambda db: db["points"].raw.update_one({"_id": number}, {"$unset": {field: ""}})


def of_fold(fold: str, spoil: Callable[[int], Spoil]) -> Spoil:
    """Spoil the sixth document of a fold."""
    return lambda db: spoil(fold_ids(db, fold)[5])(db)


def no_valid(db: Datalayer) -> None:
    db["points"].raw.update_many({}, {"$set": {"_fold": "train"}})


def as_nan(output: Tensor, target: Tensor) -> Tensor:
    return output.sum() * math.nan


def rows(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target, reduction="none")


def number(output: Tensor, target: Tensor) -> float:
    return nn.functional.cross_entropy(output, target).item()


def words(output: Tensor, target: Tensor) -> str:
    return "good"


def measured(**given: Any) -> dict[str, Any]:
    return {"model": model(validation=Validation("v", **given))}


CASES: dict[str, Case] = {
    "no document": Case(
        error=EmptySelectError, given={"select": Query.find("points", {"n": -1})}, words="'points'"
    ),
    "no collection": Case(error=EmptySelectError, given={"select": Query.find("pionts")}, words="'pionts'"),
    "an unknown fold": Case(
        error=FoldMissingError, spoil=change(7, _fold="test"), field="_fold", document=7, words="assign_folds"
    ),
    "empty valid": Case(error=EmptyFoldError, spoil=no_valid, field="_fold", words="'valid'"),
    "missing field": Case(
        error=FieldMissingError, spoil=of_fold("train", lambda n: unset(n, "x")), field="x", document="train"
    ),
    "missing in validation": Case(
        error=FieldMissingError, spoil=of_fold("valid", lambda n: unset(n, "y")), field="y", document="valid"
    ),
    "missing everywhere": Case(error=FieldMissingError, given={"key": ("x", "label")}, field="label", document=0),
    "ragged": Case(
        error=ShapeError, spoil=of_fold("train", lambda n: change(n, x=[1.0])), field="x", document="train"
    ),
    "text": Case(
        error=DataError, spoil=of_fold("train", lambda n: change(n, x="four")), field="x", document="train"
    ),
    "nan loss": Case(error=NonFiniteLossError, given={"objective": as_nan}, words="step 1"),
    "nan data": Case(
        error=NonFiniteLossError, spoil=of_fold("train", lambda n: change(n, x=[math.nan] * 4)), words="step 1"
    ),
    "nan in validation": Case(
        error=NonFiniteLossError, spoil=of_fold("valid", lambda n: change(n, x=[math.nan] * 4)), words="'valid'"
    ),
    "divergence": Case(
        error=NonFiniteLossError,
        given={"optimizer_cls": "SGD", "optimizer_kwargs": {"lr": 1e30}},
        words="learning",
    ),
    "vector objective": Case(error=ParameterError, given={"objective": rows}, field="objective", words="scalar"),
    "detached objective": Case(error=ParameterError, given={"objective": number}, field="objective"),
    "metric of words": Case(
        error=ParameterError, given=measured(metrics=[Metric("mine", object=words)]), field="mine"
    ),
    "empty dataset": Case(
        error=EmptySelectError, given=measured(datasets=[Dataset("d", select=Query.find("d"))]), words="'d'"
    ),
    "other names": Case(
        error=SignatureError,
        given={"key": {"x": "image", "y": "target"}, "signature": "**kwargs"},
        field="signature",
    ),
    "another model's optimizer": Case(
        error=OptimizerError,
        given={"optimizer_state": torch.optim.Adam([nn.Parameter(torch.zeros(1))]).state_dict()},
        field="optimizer_state",
    ),
    "no such device": Case(
        error=ParameterError,
        given={"compute_kwargs": {"device": "cuda:77"}},
        field="compute_kwargs",
        words="cuda:77",
    ),
}


OF_DATA = [name for name, case in CASES.items() if case.document is not None or "missing" in name]


@pytest.mark.parametrize(
    ("name", "in_memory"), [*((name, True) for name in CASES), *((name, False) for name in OF_DATA)]
)
def test_bad_input_ends_in_one_typed_error_and_a_failed_job(db: Datalayer, name: str, in_memory: bool) -> None:
    case = CASES[name]
    select = fill(db)
    document = fold_ids(db, case.document)[5] if isinstance(case.document, str) else case.document
    case.spoil(db)

    job = db.apply(trainer(**{"select": select, "in_memory": in_memory, **case.given}))

    with pytest.raises(case.error, match=case.words) as caught:
        job.result()
    assert type(caught.value) is case.error
    if name == "missing everywhere":  # the first of either fold: both are looked at before the first step
        document = caught.value.document_id
        assert document in {fold_ids(db, fold)[0] for fold in ("train", "valid")}
    assert (caught.value.field, caught.value.document_id) == (case.field, document)
    assert (job.status, job.done()) == ("failed", True)
    error = job.record["error"]
    assert (error["type"], error["field"], error["document_id"]) == (case.error.__name__, case.field, document)
    assert "Traceback" in error["traceback"]
    assert job.record["finished"] is not None
    assert (db.show("model", "m"), db.show("trainer", "t")) == ([0], [0])
    assert same(state(db.load("model", "m")), state(net()))


def test_documents_that_came_another_way_are_trained_on(db: Datalayer) -> None:
    db["points"].raw.insert_many(points())
    applied = trainer(db["points"].find())

    assert db.apply(applied).result().version == 1
    assert db["points"].count({"_fold": {"$exists": True}}) == 0


def test_without_validation_no_valid_fold_is_needed(db: Datalayer) -> None:
    select = fill(db)
    no_valid(db)

    assert db.apply(trainer(select, validation_interval=None)).result().version == 1


def test_an_interval_longer_than_the_run_still_needs_the_valid_fold(db: Datalayer) -> None:
    select = fill(db)
    no_valid(db)

    with pytest.raises(EmptyFoldError):
        db.apply(trainer(select, max_iterations=2, validation_interval=100)).result()


def test_a_failure_after_a_good_run_leaves_the_good_version(db: Datalayer) -> None:
    select = fill(db)
    good = db.apply(trainer(select)).result()
    before = documents_in(db)["mt.components"]

    job = db.apply(good.trainer.replace(objective=as_nan))

    assert isinstance(job.exception(), NonFiniteLossError)
    assert db.load("model", "m").uuid == good.uuid
    assert documents_in(db)["mt.components"] == before + 1  # the trainer as it was applied


def test_an_unknown_class_of_the_optimizer_is_found_before_anything_is_stored(db: Datalayer) -> None:
    with pytest.raises(OptimizerError):
        db.apply(trainer(fill(db), optimizer_cls="Adem"))

    assert documents_in(db) == {}
