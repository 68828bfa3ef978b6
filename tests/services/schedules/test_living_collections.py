"""Runs of schedules over collections that others write to see the documents that they began with, and no others.

Each test runs on both backends; the others are a plain client, which knows nothing of folds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, ClassVar

import pytest
import torch
from tests.helpers import COLLECTION, Recorder, fill, fold_ids, number_of, points, trainer
from torch import Tensor

from mongotorch import Always, Better, Datalayer, Every, Query, Schedule, TorchModel, Worker
from mongotorch.services.schedules.retraining import Retraining
from mongotorch.services.training.recipe import data_provenance
from mongotorch.services.versions.promotion import Promoter


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Interrupted(Recorder):
    """A trainer that lets others write between its steps."""

    meanwhile: ClassVar[Callable[[int], None]] = staticmethod(lambda step: None)

    def take_step(self, model: TorchModel, batch: Any, optimizers: Any) -> Tensor:
        """A step as always, and what others do after it."""
        loss = super().take_step(model, batch, optimizers)
        type(self).meanwhile(len(self.steps))
        return loss


def foreign(first: int, count: int = 20, **given: Any) -> list[dict[str, Any]]:
    """Documents of another client, without a fold unless one is given; `_id`s between those that are there."""
    rows = points(count)
    return [{**row, "_id": first + n + 0.5, "n": 10_000 + first + n, **given} for n, row in enumerate(rows)]


def scheduled(db: Datalayer, select: Query, **given: Any) -> Schedule:
    """A schedule that fires by hand, of a trainer that tells which documents it was trained on."""
    usual: dict[str, Any] = {
        "key": ("x", "n"),
        "objective": number_of,
        "loader_kwargs": {"batch_size": 16, "shuffle": given.pop("shuffle", True)},
        "max_iterations": 15,
    }
    chosen = {name: given.pop(name) for name in ("gate", "data", "warm_start") if name in given}
    return Schedule(
        "s", trigger=Every(seconds=1e6), trainer=trainer(select, Interrupted, **{**usual, **given}), **chosen
    )


def run(db: Datalayer, schedule: Schedule, meanwhile: Callable[[int], None]) -> dict[str, Any]:
    """Run a schedule once, while others write; the document of the version that it brings."""
    db.apply(schedule)
    if not db.history("model", "m"):
        db.promote("model", "m", 0)  # something to be compared with
    Recorder.steps.clear()
    Interrupted.meanwhile = staticmethod(meanwhile)
    job = db.fire("s")
    try:
        Worker(db).run(until_idle=True)
    finally:
        Interrupted.meanwhile = staticmethod(lambda step: None)
    version = job.result(timeout=5).version
    document: dict[str, Any] = db.show("model", "m", version)
    return document


SELECTS: dict[str, Callable[[Datalayer], Query]] = {
    "all": lambda db: db[COLLECTION].find(),
    "filter": lambda db: db[COLLECTION].find({"y": {"$lt": 2}}),
    "sort": lambda db: db[COLLECTION].find().sort("n", -1),
    "newest": lambda db: db[COLLECTION].find().sort("n", -1).limit(60),
    "skip": lambda db: db[COLLECTION].find().sort("_id", -1).skip(5).limit(60),
    "pipeline": lambda db: db[COLLECTION].aggregate([{"$match": {"y": {"$lt": 2}}}, {"$sort": {"n": 1}}]),
}


CASES: list[tuple[str, dict[str, Any]]] = [(select, {}) for select in SELECTS] + [
    ("all", {"in_memory": True}),
    ("newest", {"download": True}),
]


@pytest.mark.parametrize(("select", "mode"), CASES)
def test_a_run_sees_the_documents_it_began_with_whatever_others_insert(
    db: Datalayer, select: str, mode: dict[str, Any]
) -> None:
    fill(db)
    query = SELECTS[select](db)
    raw = db[COLLECTION].raw
    members = {fold: [row["n"] for row in db.execute(query.fold(fold))] for fold in ("train", "valid")}

    def meanwhile(step: int) -> None:
        raw.insert_many(foreign(1000 * step))  # newer ones, without a fold
        raw.insert_many(foreign(10 * step, 5, _fold="train"))  # between those that are there
        raw.insert_many(foreign(10 * step + 5, 5, _fold="valid"))

    document = run(db, scheduled(db, query, **mode), meanwhile)
    verdict = document["verdict"]
    assert verdict["documents"] == len(members["valid"]), verdict
    assert "against the champion's" in verdict["why"]
    assert document["data"]["train"]["count"] == len(members["train"])
    assert document["data"]["valid"]["count"] == len(members["valid"])
    trained = [n for batch in Recorder.steps for n in batch]
    assert set(trained) == set(members["train"])
    epochs, rest = divmod(len(trained), len(members["train"]))
    assert epochs >= 1
    counts = {n: trained.count(n) for n in members["train"]}
    assert set(counts.values()) <= {epochs, epochs + bool(rest)}, "each document once an epoch"


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("kind", ["int", "date"])
def test_a_range_of_only_what_others_inserted_stops_nothing(
    db: Datalayer, monkeypatch: pytest.MonkeyPatch, kind: str, in_memory: bool
) -> None:
    """Between the look at which documents there are, and the plan of the ranges in which they are read."""

    def rows(first: int) -> list[dict[str, Any]]:
        made = [{**row, "_id": first + row["_id"]} for row in points()]
        return made if kind == "int" else [{**row, "_id": datetime.fromtimestamp(row["_id"], UTC)} for row in made]

    raw = db[COLLECTION].raw
    raw.insert_many(rows(0))

    def looked(*given: Any, **named: Any) -> Any:
        found = data_provenance(*given, **named)
        raw.insert_many(rows(1000))
        return found

    monkeypatch.setattr("mongotorch.services.training.training_run.data_provenance", looked)
    made = scheduled(db, db[COLLECTION].find(), in_memory=in_memory, prefetch_size=10)
    document = run(db, made, lambda step: None)
    assert document["data"]["train"]["count"] + document["data"]["valid"]["count"] == len(points())
    assert document["verdict"]["documents"] == document["data"]["valid"]["count"]


def test_a_document_that_is_deleted_meanwhile_is_left_out_and_stops_nothing(db: Datalayer) -> None:
    fill(db)
    gone = {"train": fold_ids(db, "train")[-10:], "valid": fold_ids(db, "valid")[:3]}

    def meanwhile(step: int) -> None:
        db[COLLECTION].raw.delete_many({"_id": {"$in": [*gone["train"], *gone["valid"]]}})

    count = {fold: len(fold_ids(db, fold)) for fold in ("train", "valid")}
    document = run(db, scheduled(db, db[COLLECTION].find()), meanwhile)
    assert document["verdict"]["documents"] == count["valid"] - 3
    assert document["data"]["train"]["count"] == count["train"], "what the run began with"


def test_a_document_that_goes_to_the_other_fold_meanwhile_is_in_neither(db: Datalayer) -> None:
    fill(db)
    train, valid = fold_ids(db, "train"), fold_ids(db, "valid")

    def meanwhile(step: int) -> None:
        db[COLLECTION].raw.update_one({"_id": valid[0]}, {"$set": {"_fold": "train"}})
        db[COLLECTION].raw.update_one({"_id": train[0]}, {"$set": {"_fold": "valid"}})

    document = run(db, scheduled(db, db[COLLECTION].find()), meanwhile)
    assert document["verdict"]["documents"] == len(valid) - 1
    assert valid[0] not in {n for batch in Recorder.steps for n in batch}


@pytest.mark.parametrize("lineage", [True, False])
def test_a_run_that_never_validates_is_judged_on_what_was_there_when_it_began(
    uri: str, tmp_path: Any, lineage: bool
) -> None:
    with Datalayer.connect(uri, valid_fraction=0.2, progress=False, lineage=lineage) as db:
        fill(db)
        valid = len(fold_ids(db, "valid"))

        def meanwhile(step: int) -> None:
            db[COLLECTION].raw.insert_many(foreign(10 * step, 5, _fold="valid"))
            db[COLLECTION].raw.insert_many(foreign(10 * step + 5, 5, _fold="train"))

        document = run(db, scheduled(db, db[COLLECTION].find(), validation_interval=None), meanwhile)
        assert document["verdict"]["documents"] == valid
        assert max(n for batch in Recorder.steps for n in batch) < 10_000
        assert ("train" in document["data"]) == lineage


def test_a_resumed_run_goes_on_with_the_documents_it_began_with(db: Datalayer) -> None:
    fill(db)
    members = {fold: fold_ids(db, fold) for fold in ("train", "valid")}
    worker = Worker(db)

    def meanwhile(step: int) -> None:
        db[COLLECTION].raw.insert_many(foreign(10 * step, 5, _fold="train"))
        db[COLLECTION].raw.insert_many(foreign(10 * step + 5, 5, _fold="valid"))
        if step in (3, 7, 10):
            worker.stop()

    db.apply(scheduled(db, db[COLLECTION].find()))
    db.promote("model", "m", 0)
    job = db.fire("s")
    Recorder.steps.clear()
    Interrupted.meanwhile = staticmethod(meanwhile)
    try:
        for _ in range(4):
            worker = Worker(db)
            worker.run(until_idle=True)
    finally:
        Interrupted.meanwhile = staticmethod(lambda step: None)
    document = db.show("model", "m", job.result(timeout=5).version)
    assert job.record["attempt"] == 4
    assert document["verdict"]["documents"] == len(members["valid"])
    assert {n for batch in Recorder.steps for n in batch} == set(members["train"])


def test_models_are_judged_by_the_objective_on_the_same_documents(db: Datalayer) -> None:
    fill(db)
    valid = list(db.execute(db[COLLECTION].find().fold("valid")))

    def meanwhile(step: int) -> None:
        db[COLLECTION].raw.insert_many(foreign(10 * step, 5, _fold="valid"))

    document = run(db, scheduled(db, db[COLLECTION].find(), gate=Better()), meanwhile)
    x, n = torch.tensor([row["x"] for row in valid]), torch.tensor([row["n"] for row in valid])
    verdict = document["verdict"]
    for name, version in (("champion", 0), ("challenger", document["version"])):
        module = db.load("model", "m", version).object
        with torch.no_grad():
            expected = number_of(module(x.float()), n).item()
        assert verdict[name]["objective"] == pytest.approx(expected, rel=1e-5)


def test_a_gate_that_raises_keeps_the_trained_model(db: Datalayer) -> None:
    fill(db)

    def gate(champion: Any, challenger: Any) -> bool:
        raise KeyError("accuracy")

    document = run(db, scheduled(db, db[COLLECTION].find(), gate=gate), lambda step: None)
    assert document["version"] == 1
    assert not document["verdict"]["promote"]
    assert "the gate raised KeyError: 'accuracy'" in document["verdict"]["why"]
    assert db.load("model", "m").version == 0
    assert db.schedules()[0]["outcome"]["why"] == document["verdict"]["why"]


@pytest.mark.parametrize("kind", ["text", "mixed", "pipeline"])
def test_many_new_documents_with_long_ids_are_no_update_too_large(
    db: Datalayer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mongotorch.services.schedules.retraining._NAMED_BYTES", 4000)
    raw = db[COLLECTION].raw
    fill(db)
    select = db[COLLECTION].find() if kind != "pipeline" else db[COLLECTION].aggregate([{"$sort": {"n": 1}}])
    of_new = scheduled(db, select, data="new", gate=Always())
    first = run(db, of_new, lambda step: None)
    rows = points(200)
    texts = [{**row, "_id": f"{'x' * 200}{row['n']:05}", "n": 1000 + row["n"]} for row in rows]
    if kind == "mixed":
        texts += [{**row, "_id": 50_000 + row["n"], "n": 5000 + row["n"]} for row in rows[:20]]
    raw.insert_many(texts)

    def meanwhile(step: int) -> None:
        raw.insert_one({**rows[0], "_id": f"{'x' * 200}00010{step:03}", "n": 9000 + step, "_fold": "train"})

    second = run(db, of_new, meanwhile)
    trained = {n for batch in Recorder.steps for n in batch}
    new = {
        row["n"] for row in db.execute(Query.find(COLLECTION, {"n": {"$gte": 1000, "$lt": 9000}}).fold("train"))
    }
    assert trained == new
    assert second["data"]["train"]["count"] == len(new)
    assert "new documents" in second["schedule"]["why"]
    assert first["data"]["train"]["count"] == len(fold_ids(db, "train")) - len(new) - len(Recorder.steps)
    raw.delete_many({"n": {"$gte": 9000}})
    assert db.reproduce(db.load("model", "m", second["version"]).uuid).same


def negate(db: Datalayer) -> None:
    """Change the labels of all documents: the same documents, folds and number."""
    for row in db[COLLECTION].raw.find():
        db[COLLECTION].raw.update_one({"_id": row["_id"]}, {"$set": {"n": -row["n"]}})


def test_a_download_is_of_the_labels_of_today_and_the_record_says_so(db: Datalayer) -> None:
    fill(db)
    labelled = scheduled(db, db[COLLECTION].find(), download=True, gate=Always(), warm_start=False, shuffle=False)
    first = run(db, labelled, lambda step: None)
    yesterday = [list(batch) for batch in Recorder.steps]
    negate(db)
    second = run(db, labelled, lambda step: None)
    assert Recorder.steps == [[-n for n in batch] for batch in yesterday]
    assert second["data"]["train"]["digest"] != first["data"]["train"]["digest"]
    again = db.reproduce(db.load("model", "m", second["version"]).uuid)
    assert again.same, again
    negate(db)
    assert not db.reproduce(db.load("model", "m", second["version"]).uuid).trained
    assert db.reproduce(db.load("model", "m", first["version"]).uuid).same


def test_a_resumed_run_starts_where_it_began_whatever_went_live_meanwhile(db: Datalayer) -> None:
    fill(db)
    db.apply(scheduled(db, db[COLLECTION].find(), gate=Always()))
    first = db.fire("s")
    Worker(db).run(until_idle=True)
    begun = first.result(timeout=5)
    job = db.fire("s")
    stopped = Worker(db)
    Interrupted.meanwhile = staticmethod(lambda step: stopped.stop())
    Recorder.steps.clear()
    try:
        stopped.run(until_idle=True)
    finally:
        Interrupted.meanwhile = staticmethod(lambda step: None)
    assert job.status == "queued"
    db.promote("model", "m", 0)
    Worker(db).run(until_idle=True)
    document = db.show("model", "m", job.result(timeout=5).version)
    assert document["start"]["model"] == begun.uuid
    assert document["verdict"]["against"]["version"] == 0, "and is judged against what is live at the end"
    assert len(Recorder.steps) == 15, "the step that was made is not made again"


@pytest.mark.parametrize("looked", [False, True])
def test_a_promotion_is_refused_when_another_version_went_live_after_the_verdict(
    db: Datalayer, monkeypatch: pytest.MonkeyPatch, looked: bool
) -> None:
    fill(db)
    db.apply(scheduled(db, db[COLLECTION].find(), gate=Always()))
    db.fire("s")
    Worker(db).run(until_idle=True)
    cls, name = (Promoter, "promote") if looked else (Retraining, "_promote")
    promote = getattr(cls, name)

    def too_late(self: Any, *args: Any, **given: Any) -> Any:
        if given.get("job") is not None:  # the run itself, which has looked at what is live, or not yet
            db.promote("model", "m", 0, why="by hand, meanwhile")
        return promote(self, *args, **given)

    monkeypatch.setattr(cls, name, too_late)
    job = db.fire("s")
    Worker(db).run(until_idle=True)
    version = job.result(timeout=5).version
    assert version == 2
    assert db.show("model", "m", version)["verdict"]["promote"]
    assert db.load("model", "m").version == 0, "what a person made live stays live"
    outcome = db.schedules()[0]["outcome"]
    assert not outcome["promoted"]
    against = db.show("model", "m", 1)["_id"]
    assert ("moved" if looked else f"it was judged against {against}") in outcome["why"]
    assert [move.to_version for move in db.history("model", "m")][-1] == 0


MEASURED: list[list[int]] = []


def watched(output: Tensor, n: Tensor) -> Tensor:
    """An objective that keeps which documents are measured without gradients."""
    if not torch.is_grad_enabled():
        MEASURED.append(n.tolist())
    return number_of(output, n)


def test_validation_and_judging_are_never_shuffled(db: Datalayer) -> None:
    fill(db)
    MEASURED.clear()
    made = scheduled(db, db[COLLECTION].find(), objective=watched, validation_interval=5)
    run(db, made, lambda step: None)
    order = fold_ids(db, "valid")
    whole = [batch for batch in MEASURED if len(batch) > 1]
    slices = [order[at : at + 16] for at in range(0, len(order), 16)]
    assert all(batch in slices for batch in whole), "in the order of their `_id`, each time"
    assert all(sum(batch == part for batch in whole) >= 3 for part in slices)
