"""Where versions come from: the facts of their data, how two differ, who saw a document, the same bits again."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
from bson import Timestamp
from tests.helpers import COLLECTION, documents_in, fill, fold_ids, model, points, trainer
from torch import Tensor, nn

from mongotorch import Always, Datalayer, Metric, NewDocuments, Query, Schedule, TorchModel, Validation, Worker
from mongotorch.data import Difference, Members
from mongotorch.errors import DataError, NotFoundError, ParameterError, TrustError


def facts(db: Datalayer, trained: TorchModel) -> dict[str, Any]:
    """The document of a model, with its `data`."""
    document: dict[str, Any] = db.show("model", trained.identifier, trained.version)
    return document


def again(db: Datalayer, select: Query, **given: Any) -> TorchModel:
    """A run of the same trainer over what is there now."""
    trained: TorchModel = db.apply(trainer(select, **given), force=True).result()
    return trained


def mean(output: Tensor, target: Tensor) -> Tensor:
    return output.mean()


def test_a_version_says_what_it_was_made_of(db: Datalayer, uri: str) -> None:
    select = fill(db)
    validation = Validation("v", metrics=[Metric("mean", object=mean)])
    trained = db.apply(trainer(select, seed=7, model=model(validation=validation))).result()

    document = facts(db, trained)

    data, folds = document["data"], {fold: fold_ids(db, fold) for fold in ("train", "valid")}
    assert Query.from_document(data["query"]) == select.fold("train")
    assert {fold: data[fold]["count"] for fold in folds} == {fold: len(ids) for fold, ids in folds.items()}
    assert data["members"] in document["blobs"]
    held = Members.from_bytes(db._services.catalog.blobs.get(data["members"]))
    assert (held.count, held.digest) == (data["train"]["count"], data["train"]["digest"])
    assert [n for n in range(120) if held.holds(n)] == folds["train"]
    assert isinstance(data["watermark"], Timestamp) == uri.startswith("mongodb")
    assert document["seed"] == 7
    assert {"python", "torch", "platform"} <= document["environment"].keys()
    best = document["best_step"] // 4 - 1
    measured = {name: values[best] for name, values in trained.trainer.metric_values.items()}
    assert document["metrics"] == measured
    assert measured.keys() == {"objective", "mean"}
    assert data["members"] not in db.gc(grace_s=0).blobs
    assert db.verify().problems == ()


def test_what_was_never_measured_has_no_metrics(db: Datalayer) -> None:
    document = facts(db, db.apply(trainer(fill(db), validation_interval=None)).result())

    assert document["metrics"] == {}
    assert document["data"]["valid"] is None
    assert document["data"]["train"]["count"] == len(fold_ids(db, "train"))


def test_the_facts_do_not_depend_on_the_order_of_insertion(db: Datalayer) -> None:
    first = facts(db, again(db, fill(db)))["data"]
    db[COLLECTION].delete_many({})
    documents = points()
    random.Random(99).shuffle(documents)
    db[COLLECTION].insert_many(documents)

    second = facts(db, again(db, db[COLLECTION].find()))["data"]

    assert [first[name] for name in ("train", "valid", "members")] == [
        second[name] for name in ("train", "valid", "members")
    ]


def test_without_lineage_a_version_knows_its_query_only(uri: str) -> None:
    with Datalayer.connect(uri, lineage=False, valid_fraction=0.2, progress=False) as db:
        select = fill(db)
        one, other = again(db, select), again(db, select)

        assert facts(db, one)["data"] == {"query": select.fold("train").to_document()}
        found = db.diff(one.uuid, other.uuid)
        assert (found.data, found.documents) == (None, (None, None))
        assert "lineage" in found.data_unknown
        assert [held.certain for held in db.trained_on(0, COLLECTION)] == [False, False]
        assert db.reproduce(one.uuid).same


def test_two_versions_differ_by_what_was_done_between_them(db: Datalayer) -> None:
    select = fill(db)
    old = again(db, select)
    train = fold_ids(db, "train")
    db[COLLECTION].delete_many({"_id": {"$in": train[:4]}})
    db[COLLECTION].update_many({"_id": {"$in": train[4:10]}}, {"$set": {"x": [0.0, 0.0, 0.0, 1.0]}})
    db[COLLECTION].raw.insert_many({"_id": 1000 + n, "x": [0.5] * 4, "y": 0, "_fold": "train"} for n in range(3))
    new = again(db, select, optimizer_kwargs={"lr": 0.02}, seed=1, objective=mean_loss)

    found = db.diff(old.uuid, new.uuid)

    assert found.data is not None
    assert (found.data.added, found.data.removed, found.data.changed) == (3, 4, 6)
    assert found.documents == (len(train), len(train) - 1)
    assert found.parameters == {
        "trainer.objective": ("torch.nn.functional.cross_entropy", f"{__name__}.mean_loss"),
        "trainer.optimizer_kwargs": ({"lr": 0.01}, {"lr": 0.02}),
        "trainer.optimizer_state": "changed",
        "trainer.seed": (0, 1),
        "model.object": "changed",
    }
    assert found.metrics.keys() == {"objective"}
    assert found.environment == {}
    assert "3 added, 4 removed, 6 changed" in str(found)
    assert "trainer.seed: 0 -> 1" in str(found)
    assert found.to_document()["data"] == {"added": 3, "removed": 4, "changed": 6}
    backwards = db.diff(new.uuid, old.uuid).data
    assert backwards is not None
    assert (backwards.added, backwards.removed, backwards.changed) == (4, 3, 6)


def mean_loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target) * 2


def test_a_diff_with_what_was_never_trained_says_why_nothing_is_known_of_the_data(db: Datalayer) -> None:
    trained = again(db, fill(db))
    untrained = db.load("model", "m", 0)

    found = db.diff(untrained.uuid, trained.uuid)

    assert found.data is None
    assert "of the earlier version: it was stored as it was given" in found.data_unknown
    assert found.parameters["model.object"] == "changed"
    assert not db.diff(trained.uuid, trained.uuid).parameters
    with pytest.raises(NotFoundError):
        db.diff(trained.uuid, "no-such-uuid")


@pytest.mark.parametrize("together", [1, 500])
def test_who_was_trained_on_a_document_is_known(
    db: Datalayer, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    monkeypatch.setattr("mongotorch.services.lineage._SETS_AT_ONCE", together)
    select = fill(db)
    seen, unseen = fold_ids(db, "train")[0], fold_ids(db, "valid")[0]
    first = again(db, select)
    db[COLLECTION].delete_many({"_id": seen})
    second = again(db, select)
    db[COLLECTION].raw.insert_one({"_id": "late", "x": [0.5] * 4, "y": 0, "_fold": "train"})
    third = again(db, select)

    def uuids(document_id: Any, collection: str | None = None) -> list[str]:
        found = db.trained_on(document_id, collection)
        assert all(held.certain for held in found)
        assert [db.load(held.type_id, held.identifier, held.version).uuid for held in found] == [
            held.uuid for held in found
        ]
        return [held.uuid for held in found]

    assert uuids(seen) == [first.uuid]
    assert uuids("late") == [third.uuid]
    assert uuids(unseen) == uuids("no such document") == []
    assert uuids(fold_ids(db, "train")[5], COLLECTION) == [third.uuid, second.uuid, first.uuid]
    assert uuids(seen, "elsewhere") == []
    with pytest.raises(DataError):
        db.trained_on(object())


@pytest.mark.parametrize("mode", [{"in_memory": True}, {"data_prefetch": True, "prefetch_size": 16}])
def test_a_version_comes_out_again_with_the_same_bits(db: Datalayer, mode: dict[str, Any]) -> None:
    shuffled = {"batch_size": 16, "shuffle": True}
    first = db.apply(trainer(fill(db), loader_kwargs=shuffled, **mode)).result()
    second = db.apply(first.trainer.replace(max_iterations=8)).result()  # goes on with weights and optimizer
    before = documents_in(db)

    for trained in (first, second):
        found = db.reproduce(trained.uuid)
        assert (found.same, found.trained, found.changed) == (True, True, [])
        assert str(found) == "the same bits"
    assert {name: n for name, n in documents_in(db).items() if name != "mt.plans"} == {
        name: n for name, n in before.items() if name != "mt.plans"
    }


def test_data_that_has_changed_is_said_before_anything_is_trained(db: Datalayer) -> None:
    trained = db.apply(trainer(fill(db))).result()
    train, valid = fold_ids(db, "train"), fold_ids(db, "valid")
    db[COLLECTION].update_many({"_id": {"$in": train[:20]}}, {"$set": {"y": 1}})
    db[COLLECTION].delete_many({"_id": {"$in": [train[-1], valid[-1]]}})

    found = db.reproduce(trained.uuid)

    changed = sum(points()[n]["y"] != 1 for n in train[:20])
    assert (found.same, found.trained) == (False, False)
    assert found.changed == [
        f"data of fold 'train': 0 added, 1 removed, {changed} changed",
        f"data of fold 'valid': {len(valid)} documents then, {len(valid) - 1} now",
    ]
    anyway = db.reproduce(trained.uuid, anyway=True)
    assert (anyway.same, anyway.trained) == (False, True)
    assert anyway.changed[:2] == found.changed
    assert anyway.changed[2:] == [
        f"weight {name!r} came out otherwise" for name in ("0.weight", "0.bias", "2.weight", "2.bias")
    ]


def test_another_environment_and_another_result_are_said(db: Datalayer) -> None:
    trained = db.apply(trainer(fill(db))).result()
    components = db["mt.components"].raw
    components.update_one({"_id": trained.uuid}, {"$set": {"environment.torch": "1.0"}})
    parent = facts(db, trained)["fields"]["trainer"]["_ref"]
    source = db.show("trainer", "t", db.load(uuid=parent).version)["parent"]
    components.update_one({"_id": source}, {"$set": {"fields.seed": 5, "fields.loader_kwargs.shuffle": True}})

    found = db.reproduce(trained.uuid)

    assert (found.same, found.trained) == (False, True)
    assert found.changed[0].startswith("environment: torch 1.0 then, ")
    assert "weight '0.weight' came out otherwise" in found.changed
    assert found.to_document()["same"] is False


def test_what_no_run_has_published_cannot_come_out_again(db: Datalayer) -> None:
    trained = again(db, fill(db))

    for uuid in (db.load("model", "m", 0).uuid, db.load("trainer", "t").uuid):
        with pytest.raises(ParameterError, match="no model that a run has published"):
            db.reproduce(uuid)
    db.remove("trainer", "t", 0, force=True)
    with pytest.raises(NotFoundError, match="what the version was trained from is gone"):
        db.reproduce(trained.uuid)


def test_what_a_schedule_trained_comes_out_again_from_where_it_began(db: Datalayer) -> None:
    select = fill(db)
    made = trainer(select, loader_kwargs={"batch_size": 8, "shuffle": True})
    db.apply(Schedule("s", trainer=made, trigger=NewDocuments(30), gate=Always(), data="new"))
    for start in (1000, 2000):  # the first run takes everything, the second what is new since, and goes on
        db[COLLECTION].insert_many({**row, "_id": start + row["_id"]} for row in points(40))
        Worker(db).run(until_idle=True)
        found = db.reproduce(db.load("model", "m").uuid)
        assert (found.same, found.changed) == (True, [])
    first, second = (db.show("model", "m", version) for version in (1, 2))

    assert second["start"]["model"] == first["_id"]
    assert second["data"]["train"]["count"] < 40 < first["data"]["train"]["count"]
    assert db.diff(first["_id"], second["_id"]).data == Difference(
        added=second["data"]["train"]["count"], removed=first["data"]["train"]["count"], changed=0
    )


stop = threading.Event()
stopped_at: list[Worker] = []


def stopping(output: Tensor, target: Tensor) -> Tensor:
    """An objective that has its worker stop, when that is asked for."""
    if stop.is_set():
        for worker in stopped_at:
            worker.stop()
    return nn.functional.cross_entropy(output, target)


def test_a_run_that_is_gone_on_with_keeps_the_facts_it_began_with(uri: str, tmp_path: Path) -> None:
    settings = {"compute": "queue", "valid_fraction": 0.2, "progress": False, "cache_dir": tmp_path}
    with Datalayer.connect(uri, **settings) as db:
        select = fill(db)
        count = len(fold_ids(db, "train"))
        job = db.apply(trainer(select, objective=stopping))
        worker = Worker(db)
        stopped_at[:] = [worker]
        stop.set()
        worker.run(until_idle=True)
        stop.clear()
        assert job.status == "queued"
        begun = db["mt.checkpoints"].raw.find_one()["run"]["said"]["data"]
        db[COLLECTION].raw.insert_one({"_id": "late", "x": [0.5] * 4, "y": 0, "_fold": "train"})
        db.gc(grace_s=0)

        Worker(db).run(until_idle=True)

        document = facts(db, job.result(10))
        assert document["data"] == begun
        assert document["data"]["train"]["count"] == count
        assert document["data"]["members"] in document["blobs"]
        assert db.trained_on("late") == []
        assert len(db.trained_on(fold_ids(db, "train")[0])) == 1


@pytest.mark.parametrize(
    "stages",
    [[{"$sample": {"size": 30}}], [{"$project": {"_id": 0, "x": 1, "y": 1}}], [{"$group": {"_id": "$y"}}]],
)
def test_a_query_that_does_not_say_which_documents_it_gave_is_not_certain(
    db: Datalayer, stages: list[dict[str, Any]]
) -> None:
    fill(db)
    if "$group" in stages[0]:
        stages = [{"$group": {"_id": "$y", "x": {"$first": "$x"}, "y": {"$first": "$y"}}}]
    select = Query.aggregate(COLLECTION, stages)
    trained = db.apply(trainer(select, in_memory=True, validation_interval=None)).result()

    found = {document_id: db.trained_on(document_id) for document_id in (0, 119, "never there")}
    assert {one.uuid for versions in found.values() for one in versions} == {trained.uuid}
    assert not any(one.certain for versions in found.values() for one in versions)


def test_a_random_query_does_not_claim_the_same_bits(db: Datalayer) -> None:
    fill(db)
    select = Query.aggregate(COLLECTION, [{"$sample": {"size": 30}}])
    trained = db.apply(trainer(select, in_memory=True, validation_interval=None)).result()

    reproduced = db.reproduce(trained.uuid)
    assert not reproduced.trained
    assert "other documents each time" in str(reproduced)


def test_versions_after_each_other_store_what_differs_and_say_the_same(db: Datalayer) -> None:
    select = fill(db)
    raw = db[COLLECTION].raw
    sets: list[set[int]] = []
    for turn in range(6):
        again(db, select, max_iterations=1, validation_interval=None)
        sets.append(set(fold_ids(db, "train")))
        raw.delete_one({"_id": min(sets[-1])})
        raw.update_one({"_id": max(sets[-1])}, {"$set": {"y": turn % 3, "x": [float(turn)] * 4}})
        raw.insert_one({**points(1)[0], "_id": 1000 + turn, "_fold": "train"})
    catalog = db._services.catalog
    documents = [db.show("model", "m", version) for version in db.show("model", "m")[1:]]
    names = [document["data"]["members"] for document in documents]
    lengths = [len(catalog.blobs.get(name)) for name in names]
    assert max(lengths[1:]) < lengths[0] / 2, "what differs"
    assert all(name in document["blobs"] for document, name in zip(documents, names, strict=True))
    db.remove("model", "m", 1, force=True)
    db.remove("model", "m", 3, force=True)
    db.gc(grace_s=0)
    assert db.verify().problems == (), "a version keeps what its members are made of"
    there = [2, 4, 5, 6]
    for document_id in sorted(set.union(*sets)):
        expected = [version for version in reversed(there) if document_id in sets[version - 1]]
        assert [found.version for found in db.trained_on(document_id) if found.type_id == "model"] == expected
    first, last = (db.load("model", "m", version).uuid for version in (2, 6))
    difference = db.diff(first, last).data
    assert difference is not None
    assert difference.added == len(sets[5] - sets[1])
    assert difference.removed == len(sets[1] - sets[5])


def test_a_version_without_a_record_of_its_data_is_named_as_uncertain(db: Datalayer) -> None:
    select = fill(db)
    db[OTHER].insert_many(points(60))
    db.apply(trainer(select)).result()
    elsewhere = trainer(db[OTHER].find(), model=model(identifier="other"))
    db.apply(elsewhere.replace(identifier="elsewhere")).result()
    db["mt.components"].raw.update_many({}, {"$unset": {"data": 1}})  # as 0.1.0 stored it
    found = [(one.identifier, one.version, one.certain) for one in db.trained_on(5)]
    assert sorted(found) == [("m", 1, False), ("other", 1, False)]
    assert [one.identifier for one in db.trained_on(5, collection=COLLECTION)] == ["m"]
    assert [one.identifier for one in db.trained_on(5, collection=OTHER)] == ["other"]


def test_what_is_new_is_unknown_where_a_version_does_not_say_what_it_was_trained_on(db: Datalayer) -> None:
    select = fill(db)
    db.apply(trainer(select)).result()
    db["mt.components"].raw.update_many({}, {"$unset": {"data": 1}})
    schedule = Schedule("s", trainer=trainer(select), trigger=NewDocuments(10**6), gate=Always(), data="new")
    db.apply(schedule)
    job = db.fire("s")
    Worker(db).run(until_idle=True)
    document = db.show("model", "m", job.result(timeout=5).version)
    assert "does not say which documents" in document["schedule"]["why"]
    assert document["data"]["train"]["count"] == len(fold_ids(db, "train"))


OTHER = "other points"


@pytest.mark.parametrize("change", [{"$set": {"data.members": None}}, {"$set": {"identifier": "another"}}])
def test_who_was_trained_on_a_document_is_asked_of_signed_versions_only(
    uri: str, tmp_path: Path, change: dict[str, Any]
) -> None:
    signed: dict[str, Any] = {"signing_key": "k" * 32, "trust": "signed", "progress": False, "valid_fraction": 0.2}
    with Datalayer.connect(uri, cache_dir=tmp_path, **signed) as db:
        trained = db.apply(trainer(fill(db))).result()
        seen = fold_ids(db, "train")[0]
        assert [one.uuid for one in db.trained_on(seen)] == [trained.uuid]
        db["mt.components"].raw.update_one({"_id": trained.uuid}, change)
        with pytest.raises(TrustError):
            db.trained_on(seen)


def test_an_anchor_is_followed_to_a_signed_version_only(uri: str, tmp_path: Path) -> None:
    """A trainer is visible through its model: neither may name the other without a signature that says so."""
    signed: dict[str, Any] = {"signing_key": "k" * 32, "trust": "signed", "progress": False, "valid_fraction": 0.2}
    with Datalayer.connect(uri, cache_dir=tmp_path, **signed) as db:
        trained = db.apply(trainer(fill(db))).result()
        documents = db["mt.components"].raw
        published = documents.find_one({"anchor": trained.uuid})
        assert published is not None
        assert db.load(uuid=published["_id"]).uuid == published["_id"]
        forged = {
            "type_id": "model",
            "identifier": "forged",
            "version": 0,
            "format": 2,
            "refs": [published["_id"]],
        }
        documents.insert_one({"_id": "forged", **forged})
        documents.update_one({"_id": published["_id"]}, {"$set": {"anchor": "forged"}})
        with pytest.raises(TrustError):
            db.load(uuid=published["_id"])
        documents.replace_one({"_id": published["_id"]}, published)
        documents.update_one({"_id": trained.uuid}, {"$set": {"signature": {}}})
        with pytest.raises(TrustError):
            db.load(uuid=published["_id"])
