"""Predictions that are written back: what a document gets, what is refused before, what a broken call leaves."""

from __future__ import annotations

import datetime
import subprocess
import sys
import uuid
from collections.abc import Callable
from typing import Any

import bson
import pytest
import torch
from bson import Binary, Decimal128, ObjectId
from tests.helpers import COLLECTION, fill, model, points, trainer
from torch import Tensor, nn

from mongotorch import Datalayer, TorchModel
from mongotorch.data.collection import write_field
from mongotorch.errors import (
    CodecError,
    DataError,
    EmptySelectError,
    FieldMissingError,
    MongotorchError,
    NotFoundError,
    ParameterError,
    QueryError,
    ServerUnavailableError,
    StoreError,
)
from mongotorch.services.prediction import Predicted

WRITE = "mongotorch.services.prediction.write_field"


def label(output: Tensor) -> int:
    """The class."""
    return int(output.argmax())


def trained(db: Datalayer, **given: Any) -> TorchModel:
    """A published model of the points."""
    found: TorchModel = db.apply(trainer(fill(db), model=model(postprocess=label), **given)).result()
    return found


def stored(db: Datalayer, path: str = "predicted") -> dict[Any, Any]:
    """What each document has in a field."""
    return {one["_id"]: one.get(path) for one in db[COLLECTION].raw.find()}


def record(db: Datalayer) -> dict[str, Any]:
    """The one record of predictions."""
    (found,) = db["mt.predictions"].raw.find()
    return dict(found)


def test_each_document_has_what_predict_gives_and_who_gave_it(db: Datalayer) -> None:
    published = trained(db)

    done = db.predict("model", "m", select=db[COLLECTION].find(), into="predicted", batch_size=50)

    by = {"model": "m", "version": published.version, "uuid": published.uuid}
    found = stored(db)
    for row in points():
        assert found[row["_id"]] == {"value": published.predict(torch.tensor(row["x"])), **by}
    assert (done.written, done.gone, done.skipped) == (120, 0, 0)
    assert (done.version, done.uuid, done.collection, done.into) == (1, published.uuid, COLLECTION, "predicted")
    kept = record(db)
    assert (kept["status"], kept["written"], kept["runs"], kept["alias"]) == ("succeeded", 120, 1, None)


def test_a_second_call_predicts_only_what_is_new(db: Datalayer) -> None:
    trained(db)
    everything = db[COLLECTION].find()
    db.predict("model", "m", select=everything, into="a.predicted")
    before = stored(db, "a")
    db[COLLECTION].insert_many([{"_id": "new", "x": [0.0] * 4}])

    second = db.predict("model", "m", select=everything.sort("n"), into="a.predicted")
    third = db.predict("model", "m", select=everything, into="a.predicted")
    forced = db.predict("model", "m", select=everything, into="a.predicted", force=True)

    assert (second.written, third.written, forced.written) == (1, 0, 121)
    assert stored(db, "a") == {**before, "new": stored(db, "a")["new"]}
    assert set(stored(db, "a")["new"]["predicted"]) == {"value", "model", "version", "uuid"}
    assert record(db)["written"] == 120 + 1 + 121


def test_the_live_version_predicts_and_another_one_takes_its_place(db: Datalayer) -> None:
    trained(db)
    db.promote("model", "m", 1)
    db.apply(trainer(db[COLLECTION].find(), seed=1, model=model(seed=1, postprocess=label))).result()
    newest = max(db.show("model", "m"))
    assert newest > 1

    live = db.predict("model", "m", select=db[COLLECTION].find(), into="predicted")
    assert live.version == 1
    assert record(db)["alias"] == "live"
    named = db.predict("model", "m", newest, select=db[COLLECTION].find({"n": {"$lt": 10}}), into="predicted")

    assert named.written == 10
    versions = {row: one["version"] for row, one in stored(db).items()}
    assert versions == {n: newest if n < 10 else 1 for n in range(120)}


@pytest.mark.parametrize(
    ("select", "count"),
    [
        (lambda c: c.find({"n": {"$lt": 30}}), 30),
        (lambda c: c.find().sort("n", -1).limit(7), 7),
        (lambda c: c.find().skip(100), 20),
        (lambda c: c.find({}, {"x": 1}), 120),
        (lambda c: c.aggregate([{"$match": {"n": {"$gte": 60}}}, {"$limit": 5}]), 5),
        (lambda c: c.aggregate([{"$project": {"x": {"$slice": ["$x", 4]}}}]), 120),
        (lambda c: c.find({"n": -1}), 0),
        (lambda c: c.find().fold("train"), 93),
        (lambda c: c.find({"n": {"$lt": 60}}).limit(50).fold("valid"), 14),
    ],
    ids=["filter", "limit", "skip", "projection", "pipeline", "computed", "nothing", "fold", "fold of a limit"],
)
def test_exactly_the_documents_of_the_query(db: Datalayer, select: Callable[[Any], Any], count: int) -> None:
    trained(db)
    before = {one["_id"]: one for one in db[COLLECTION].raw.find()}

    for _ in range(2):
        db.predict("model", "m", select=select(db[COLLECTION]), into="predicted")

    after = {one["_id"]: one for one in db[COLLECTION].raw.find()}
    assert sum("predicted" in one for one in after.values()) == count
    # Nothing else of a document changed, its type in BSON included.
    rest = {_id: {k: v for k, v in one.items() if k != "predicted"} for _id, one in after.items()}
    assert {_id: bson.encode(one) for _id, one in rest.items()} == {i: bson.encode(o) for i, o in before.items()}


def test_ids_of_every_type_are_found_again(server_uri: str) -> None:
    ids = [1, 2.5, 2**60, -0.5, "one", ObjectId(), True, None, datetime.datetime(2020, 1, 2, 3)]
    ids += [Binary(b"ab"), Decimal128("1.5"), Binary.from_uuid(uuid.uuid4()), {"b": 1, "a": [1, 2]}, b"raw"]
    with Datalayer.connect(server_uri, progress=False) as db:
        trained(db)
        other = db["other"]
        other.raw.insert_many([{"_id": one, "x": [0.5] * 4} for one in ids])

        done = db.predict("model", "m", select=other.find(), into="predicted", batch_size=3)

        assert (done.written, done.gone) == (len(ids), 0)
        assert other.count({"predicted.version": 1}) == len(ids)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (lambda o: o.sum(), float),
        (lambda o: o[:2].double(), Tensor),
        (lambda o: {"best": o.argmax(), "all": o}, dict),
        (lambda o: [o.max(), "text", None, True], list),
        (lambda o: (o.max().item(), o.argmax().numpy()), list),
        (lambda o: "abc"[int(o.argmax())], str),
    ],
    ids=["number", "tensor", "dict", "list", "tuple", "text"],
)
def test_values_come_back_as_users_read_them(db: Datalayer, output: Any, expected: type) -> None:
    db.apply(trainer(fill(db), model=model(postprocess=output))).result()
    db.predict("model", "m", select=db[COLLECTION].find(), into="p")
    for one in db.execute(db[COLLECTION].find()):
        assert isinstance(one["p"]["value"], expected)


def test_integers_are_what_training_made_of_them(db: Datalayer) -> None:
    fill(db)  # floats
    db["whole"].insert_many([{"_id": n, "x": [n, 1, 2, 3]} for n in range(3)])
    published = db.apply(trainer(db[COLLECTION].find(), model=model(postprocess=label))).result()

    db.predict("model", "m", select=db["whole"].find(), into="p")

    found = {one["_id"]: one["p"]["value"] for one in db["whole"].raw.find()}
    assert found == {n: published.predict([float(n), 1.0, 2.0, 3.0]) for n in range(3)}


class Named(nn.Module):
    """Takes its inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, more: Tensor, x: Tensor) -> Tensor:
        made: Tensor = self.linear(torch.cat([x, more[:, None]], 1))
        return made


@pytest.mark.parametrize(
    ("key", "signature"),
    [
        (("n", "x", "y"), "*args"),
        ({"y": "target", "x": "x", "n": "more"}, "**kwargs"),
        ((["n", "x"], {"y": "target"}), "*args,**kwargs"),
        ({"y": "target", "n": "more", "x": "x"}, "*args,**kwargs"),
    ],
)
def test_inputs_are_those_of_the_trainer(db: Datalayer, key: Any, signature: Any) -> None:
    select = fill(db)
    for n in range(120):
        db[COLLECTION].raw.update_one({"_id": n}, {"$set": {"n": n / 2}})
    made = TorchModel("m", object=Named(), postprocess=label)
    published = db.apply(trainer(select, key=key, signature=signature, model=made)).result()

    db.predict("model", "m", select=select, into="p")

    for one in list(db.execute(select))[:20]:
        x = torch.as_tensor(one["x"])
        assert one["p"]["value"] == published.predict({"x": x, "more": one["n"]})


def test_preprocess_gets_the_values_of_the_document(db: Datalayer) -> None:
    made = TorchModel("words", object=nn.Linear(1, 1), preprocess=lambda text: [float(len(text))])
    db.apply(made).result()
    db.promote("model", "words", 0)
    db["texts"].insert_many([{"text": "a" * n} for n in range(5)])

    db.predict("model", "words", select=db["texts"].find(), into="p", key="text")

    model_ = db.load("model", "words")
    for one in db.execute(db["texts"].find()):
        assert torch.equal(one["p"]["value"], model_.predict(one["text"]))


def refused(db: Datalayer, error: type[MongotorchError], match: str, **given: Any) -> MongotorchError:
    """The error of a call that changes nothing."""
    before = list(db[COLLECTION].raw.find().sort("_id", 1))
    with pytest.raises(error, match=match) as raised:
        db.predict("model", **{"identifier": "m", "select": db[COLLECTION].find(), "into": "p", **given})
    assert list(db[COLLECTION].raw.find().sort("_id", 1)) == before
    return raised.value


NO_FIELDS = ("x", "x.y", "y", "_id", "_id.a", "_fold", "", ".a", "a..b", "$set", "a.$b", "a\0", 3)


def test_a_field_that_is_read_or_is_none_is_refused(db: Datalayer) -> None:
    trained(db)
    for into in NO_FIELDS:
        assert refused(db, ParameterError, "into", into=into).field == "into"


def test_fields_that_decide_folds_or_weights_are_refused(db: Datalayer) -> None:
    db.apply(trainer(fill(db), sample_weight="n", model=model())).result()
    refused(db, ParameterError, "'n'", into="n")
    refused(db, ParameterError, "'x.a'", into="x", key="x.a")


NOT_WRITTEN_BACK: list[tuple[list[Any], str]] = [
    ([{"$group": {"_id": "$y"}}], "pipeline gives other ones"),
    ([{"$unwind": "$x"}], "several times"),
    ([{"$project": {"_id": 0, "x": 1}}], "pipeline"),
    ([{"$match": {"p.value": 1}}], "changes while it is read"),
    ([{"$match": {"$expr": {"$eq": ["$p.value", 1]}}}], "changes while it is read"),
    ([{"$sort": {"p": 1}}], "changes while it is read"),
]


def test_pipelines_that_cannot_be_written_back_are_refused(db: Datalayer) -> None:
    trained(db)
    for pipeline, match in NOT_WRITTEN_BACK:
        refused(db, QueryError, match, select=db[COLLECTION].aggregate(pipeline))
    refused(db, QueryError, "changes while", select=db[COLLECTION].find({"p": None}).limit(3))


def test_what_does_not_predict_is_refused(db: Datalayer) -> None:
    select = fill(db)
    db.apply(trainer(select)).result()
    db.apply(TorchModel("raw", object=nn.Linear(4, 3)))
    refused(db, ParameterError, "a query", select={"a": 1})
    refused(db, ParameterError, "not a collection of yours", select=db["mt.jobs"].find())
    refused(db, NotFoundError, "no such|no model|nothing", identifier="nobody")
    refused(db, NotFoundError, "version=0", identifier="raw")
    refused(db, NotFoundError, "99", version=99)
    refused(db, ParameterError, "no trainer that says", identifier="raw", version=0)
    refused(db, EmptySelectError, "'nowhere'", select=db["nowhere"].find())
    refused(db, ParameterError, "batch_size", batch_size=0)
    refused(db, FieldMissingError, "'z'", key="z")
    with pytest.raises(ParameterError, match="does not predict"):
        db.predict("trainer", "t", select=select, into="p")


def test_a_model_behind_a_transform_needs_a_preprocess(db: Datalayer) -> None:
    changed = lambda x, y: (torch.tensor(x) * 2, y)  # noqa: E731
    db.apply(trainer(fill(db), transform=changed, model=model())).result()
    refused(db, ParameterError, "transform makes of a sample")
    assert db.predict("model", "m", select=db[COLLECTION].find(), into="p", key="x").written == 120


def test_a_view_and_a_time_series_are_refused(server_uri: str) -> None:
    with Datalayer.connect(server_uri, progress=False) as db:
        trained(db)
        database = db[COLLECTION].raw.database
        database.create_collection("seen", viewOn=COLLECTION, pipeline=[])
        database.create_collection("series", timeseries={"timeField": "t"})
        refused(db, StoreError, "is a view", select=db["seen"].find())
        refused(db, StoreError, "time series", select=db["series"].find())


def test_a_document_that_cannot_be_predicted_is_named_and_the_call_goes_on(db: Datalayer) -> None:
    trained(db)
    db[COLLECTION].raw.update_one({"_id": 70}, {"$set": {"x": [1.0, 2.0]}})

    with pytest.raises(DataError) as raised:
        db.predict("model", "m", select=db[COLLECTION].find(), into="p", batch_size=20)

    assert raised.value.document_id == 70
    assert "60 document(s)" in "".join(raised.value.__notes__)
    assert sum(one is not None for one in stored(db, "p").values()) == 60
    kept = record(db)
    assert (kept["status"], kept["written"]) == ("failed", 60)
    assert "70" in kept["error"]
    db[COLLECTION].raw.update_one({"_id": 70}, {"$set": {"x": [1.0, 2.0, 3.0, 4.0]}})
    assert db.predict("model", "m", select=db[COLLECTION].find(), into="p").written == 60
    assert record(db)["status"] == "succeeded"


@pytest.mark.parametrize("value", [2**70, "half of a pair: \ud800"])
def test_a_value_that_bson_cannot_hold_names_the_document(db: Datalayer, value: Any) -> None:
    def odd(output: Tensor) -> Any:
        return value if float(output.abs().max()) > 1e6 else 1.0

    db.apply(trainer(fill(db), model=model(postprocess=odd))).result()
    db[COLLECTION].raw.update_one({"_id": 119}, {"$set": {"x": [1e9, -1e9, 1e9, 1e9]}})
    with pytest.raises(CodecError) as raised:
        db.predict("model", "m", select=db[COLLECTION].find(), into="p", batch_size=10)
    assert (raised.value.document_id, raised.value.field) == (119, "p")
    assert record(db)["written"] == 110


def test_what_the_server_refuses_names_the_document(server_uri: str) -> None:
    with Datalayer.connect(server_uri, progress=False) as db:
        trained(db)
        db[COLLECTION].raw.update_one({"_id": 30}, {"$set": {"a": 5}})
        with pytest.raises(StoreError) as raised:
            db.predict("model", "m", select=db[COLLECTION].find(), into="a.b", batch_size=50)
        assert (raised.value.document_id, raised.value.field) == (30, "a.b")
        assert record(db)["written"] == 49 == db[COLLECTION].count({"a.b.version": 1})


def test_documents_that_do_not_fit_are_left_out_where_the_trainer_says_so(db: Datalayer) -> None:
    trained(db, on_bad_document="skip")
    db[COLLECTION].raw.insert_many([{"_id": "a"}, {"_id": "b", "x": [1.0]}])
    done = db.predict("model", "m", select=db[COLLECTION].find(), into="p")
    assert (done.written, done.skipped) == (120, 2)
    assert done.why


def test_what_is_deleted_meanwhile_is_counted(db: Datalayer, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(db)

    def after_a_delete(database: Any, name: str, *given: Any) -> Any:
        database[name].delete_one({"_id": 3})
        return write_field(database, name, *given)

    monkeypatch.setattr(WRITE, after_a_delete)
    done = db.predict("model", "m", select=db[COLLECTION].find(), into="p", batch_size=200)
    assert (done.written, done.gone) == (119, 1)


@pytest.mark.parametrize("error", [ServerUnavailableError("gone"), KeyboardInterrupt(), MemoryError()])
def test_whatever_ends_a_call_is_recorded(
    db: Datalayer, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    trained(db)
    calls: list[Any] = []

    def failing(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise error
        return write_field(*given)

    monkeypatch.setattr(WRITE, failing)
    with pytest.raises(type(error)):
        db.predict("model", "m", select=db[COLLECTION].find(), into="p", batch_size=10)
    assert (record(db)["status"], record(db)["written"]) == ("failed", 20)
    monkeypatch.undo()
    assert db.predict("model", "m", select=db[COLLECTION].find(), into="p").written == 100


def test_the_record_goes_with_the_version(db: Datalayer) -> None:
    trained(db)
    db.predict("model", "m", select=db[COLLECTION].find(), into="p")
    db.gc()
    assert record(db)["into"] == "p"
    db.remove("trainer", "t", force=True)
    db.remove("model", "m", force=True)
    db.gc(dry_run=True)
    assert record(db)["into"] == "p"
    db.gc()
    assert db["mt.predictions"].raw.count_documents({}) == 0
    assert stored(db, "p")[0] is not None


def test_the_result_prints_short() -> None:
    done = Predicted(identifier="m", version=1, uuid="u", collection="c", into="p", written=3)
    assert len(repr(done)) < 200


KILLED = """
import os
from mongotorch import Datalayer
from mongotorch.services import prediction
write, calls = prediction.write_field, []
def dying(*given):
    calls.append(given)
    if len(calls) == 4:
        os._exit(9)
    return write(*given)
prediction.write_field = dying
with Datalayer.connect(sys.argv[1], progress=False) as db:
    db.predict("model", "m", select=db["points"].find(), into="p", batch_size=10)
"""


def test_a_killed_process_is_continued_by_the_same_call(server_uri: str) -> None:
    with Datalayer.connect(server_uri, progress=False) as db:
        trained(db)
        killed = subprocess.run([sys.executable, "-c", "import sys" + KILLED, server_uri], check=False)
        assert killed.returncode == 9
        before = stored(db, "p")
        assert sum(one is not None for one in before.values()) == 30
        assert record(db)["status"] == "running"

        assert db.predict("model", "m", select=db[COLLECTION].find(), into="p").written == 90

        assert record(db)["status"] == "succeeded"
        assert all(stored(db, "p")[n] == one for n, one in before.items() if one is not None)
        assert db[COLLECTION].count({"p.version": 1}) == 120
