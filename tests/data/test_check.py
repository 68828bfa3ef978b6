"""A check says what documents hold, on both backends, and finds out before a run what would end it."""

from __future__ import annotations

import datetime
import json
import math
import uuid
from typing import Any

import bson
import numpy as np
import pytest
import torch
from bson import Binary
from bson.binary import BinaryVectorDtype
from tests.helpers import COLLECTION, fill, model, trainer
from torch import Tensor, nn

from mongotorch import Datalayer, Metric, Query, TorchModel, Validation
from mongotorch.codecs.arrays import encode_document
from mongotorch.data import DataCheck, FieldCheck
from mongotorch.errors import EmptySelectError, ParameterError, SignatureError

COUNT = 60


def document(n: int) -> dict[str, Any]:
    """Documents as people have them: gaps, mixed numbers, dates as text, sub-documents, kinds of arrays."""
    made: dict[str, Any] = {
        "_id": n,
        "age": None if n % 10 == 3 else float(n) if n % 2 else n,
        "name": f"n{n}",
        "place": {"city": "x", "at": [0.5, 1]},
        "tags": ["a"] * (n % 3),
        "when": datetime.datetime(2026, 1, 1) if n % 2 else "2026-01-01",
        "vector": Binary.from_vector([0.5] * 8, BinaryVectorDtype.FLOAT32),
        "big": bson.Int64(2**40),
        "rate": math.nan if n == 7 else n / COUNT,
        "flag": n % 2 == 0,
    }
    if n % 4 == 1:
        made["rare"] = 1
    return made


@pytest.fixture
def checked(db: Datalayer) -> DataCheck:
    db["c"].raw.insert_many([document(n) for n in range(COUNT)])
    return db.check(db["c"].find())


def field(check: DataCheck, path: str) -> FieldCheck:
    return next(one for one in check.fields if one.path == path)


def test_types_gaps_and_ranges_are_counted(checked: DataCheck) -> None:
    assert (checked.documents, checked.counted, checked.sampled) == (COUNT, True, COUNT)
    assert dict(field(checked, "age").types) == {"int": 30, "double": 24, "null": 6}
    assert dict(field(checked, "rare").types) == {"missing": 45, "int": 15}
    assert dict(field(checked, "when").types) == {"string": 30, "date": 30}
    assert dict(field(checked, "big").types) == {"long": COUNT}
    assert dict(field(checked, "flag").types) == {"bool": COUNT}
    rate = field(checked, "rate")
    assert (rate.least, rate.most, rate.not_finite) == (0.0, (COUNT - 1) / COUNT, 1)
    assert sum(checked.folds.values()) == COUNT
    assert set(checked.folds) == {"train", "valid"}


def test_arrays_are_described_by_type_and_shape_and_sub_documents_by_their_fields(checked: DataCheck) -> None:
    assert dict(field(checked, "vector").types) == {"float32 array": COUNT}
    assert dict(field(checked, "vector").shapes) == {"(8,)": COUNT}
    assert dict(field(checked, "place.at").types) == {"array of double and int": COUNT}
    assert dict(field(checked, "place.at").shapes) == {"(2,)": COUNT}
    assert dict(field(checked, "tags").shapes) == {"(0,)": 20, "(1,)": 20, "(2,)": 20}
    assert [one.path for one in checked.fields if one.path.startswith("place")] == ["place.city", "place.at"]


def test_what_is_worth_a_look_is_said_in_words(checked: DataCheck) -> None:
    text = "\n".join(checked.findings)
    assert "'age': 6 of 60 documents have null" in text
    assert "'age' is a double in some documents and an integer in others: all become floats" in text
    assert "'rare': 45 of 60 documents lack it" in text
    assert "'when' is of 2 types: date, string" in text
    assert "'tags' has 3 shapes" in text
    assert "'rate': 1 of 60 documents have a NaN or an infinity" in text
    assert not [finding for finding in checked.findings if "'name'" in finding or "'vector'" in finding]
    shown = str(checked)
    assert all(one.path in shown for one in checked.fields)
    assert max(map(len, shown.splitlines())) < 200
    assert json.loads(json.dumps(checked.to_document()))["documents"] == COUNT


def test_a_large_collection_is_sampled_beyond_its_first_documents(db: Datalayer) -> None:
    db["c"].raw.insert_many([{"_id": n, "x": 1 if n < 4000 else 0.5} for n in range(6000)])
    check = db.check(db["c"].find())
    assert check.documents == 6000
    assert 500 < check.sampled <= 1000
    assert {"int", "double"} <= set(field(check, "x").types)


@pytest.mark.parametrize(
    "query",
    [
        Query.find("c", {"y": 1}),
        Query.find("c").sort("_id", -1).skip(2).limit(5),
        Query.aggregate("c", [{"$match": {"y": 1}}, {"$project": {"y": 1}}]),
    ],
)
def test_each_kind_of_query_is_checked_within_what_it_gives(db: Datalayer, query: Query) -> None:
    db["c"].raw.insert_many([{"_id": n, "y": n % 2, "only": 1 if n < 10 else "x"} for n in range(40)])
    check = db.check(query)
    assert check.sampled == check.documents == len(list(db.execute(query)))


def test_values_that_tensors_cannot_hold_and_odd_names_are_only_described(db: Datalayer) -> None:
    array = encode_document({"image": np.zeros((2, 3), np.int16)})["image"]
    db["c"].raw.insert_many(
        [
            {"_id": uuid.uuid4().bytes, "image": array, "deep": {"a": {"b": {"c": 1}}}, "ragged": [[1], [1, 2]]},
            {"_id": uuid.uuid4().bytes, "image": array, "deep": {}, "ragged": []},
        ]
    )
    check = db.check(db["c"].find())
    assert dict(field(check, "image").types) == {"int16 array": 2}
    assert dict(field(check, "image").shapes) == {"(2, 3)": 2}
    assert dict(field(check, "ragged").shapes) == {"ragged": 1, "(0,)": 1}
    assert {"deep.a.b", "deep"} <= {one.path for one in check.fields}


def test_nothing_to_look_at_and_what_is_no_query_are_refused(db: Datalayer) -> None:
    with pytest.raises(EmptySelectError, match="no document of collection 'c'"):
        db.check(db["c"].find({"nothing": 1}))
    with pytest.raises(ParameterError, match="a query or a trainer"):
        db.check("c")  # type: ignore[arg-type]


def test_a_trainer_is_tried_on_one_batch_of_each_fold_without_training(db: Datalayer) -> None:
    select = fill(db)
    net = model()
    applied = trainer(select, model=net)
    before = [parameter.detach().clone() for parameter in net.object.parameters()]
    check = db.check(applied)
    assert [one.path for one in check.fields] == ["x", "y"]
    assert set(check.folds) == {"train", "valid"}
    assert not check.findings
    assert all(map(torch.equal, before, net.object.parameters()))
    assert db.show("trainer", "t") == []
    assert db["mt.jobs"].count() == 0


def mistyped(output: Tensor, target: Tensor) -> Tensor:
    """A metric with a typo."""
    return (output.argmax(1) == target).folat().mean()  # type: ignore[attr-defined,no-any-return]


def test_a_metric_with_a_typo_fails_before_the_first_step(db: Datalayer) -> None:
    steps: list[int] = []

    def counting(output: Tensor, target: Tensor) -> Tensor:
        steps.append(len(steps)) if torch.is_grad_enabled() else None
        return nn.functional.cross_entropy(output, target)

    validation = Validation("v", metrics=[Metric("acc", object=mistyped)])
    broken = trainer(fill(db), objective=counting, model=model(validation=validation))
    for run in (lambda: db.check(broken), lambda: db.apply(broken).result()):
        with pytest.raises(AttributeError, match="folat") as caught:
            run()
        notes = "; ".join(caught.value.__notes__)
        assert "metric 'acc'" in notes
        assert "in the validation of the set 'valid', before the first step" in notes
    assert not steps


def test_a_fault_that_training_would_meet_is_said_to_be_there(db: Datalayer) -> None:
    unfit = trainer(fill(db), objective=lambda output: output.sum(), validation_interval=None)
    with pytest.raises(SignatureError, match="the objective takes") as caught:
        db.check(unfit)
    assert "in training, before the first step" in caught.value.__notes__


def distance(output: Tensor, target: Tensor) -> Tensor:
    """A mean of distances that says nothing of shapes that differ."""
    return (output - target).abs().mean()


def squeezed(output: Tensor, target: Tensor) -> Tensor:
    """The same of a column."""
    return (output.squeeze(1) - target).abs().mean()


def test_a_column_against_a_flat_target_is_a_warning_that_says_so(db: Datalayer) -> None:
    db[COLLECTION].insert_many([{"_id": n, "x": [float(n), 1.0], "y": n / 7} for n in range(80)])
    column = TorchModel("column", object=nn.Linear(2, 1))
    regression = trainer(db[COLLECTION].find(), objective=distance, model=column)
    with pytest.warns(UserWarning, match=r"output has shape \(\d+, 1\) and the target \(\d+,\)"):
        db.check(regression)
    db.check(regression.replace(objective=squeezed))  # one that compares them well is none
