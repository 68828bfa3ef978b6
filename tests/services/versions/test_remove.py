"""Removing: what others need stays, and what others share stays whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.helpers import documents_in, fill, model, same, seeded, state, trainer
from torch import nn

from mongotorch import Datalayer, Metric, TorchModel, Validation
from mongotorch.errors import InUseError, NotFoundError
from mongotorch.store import BlobStore


def wide(last: int) -> nn.Module:
    """A net whose first layer, of more bytes than share a blob, is the same for every `last`."""
    first = seeded(lambda: nn.Linear(64, 64))
    return nn.Sequential(first, seeded(lambda: nn.Linear(64, 3), last))


def blobs(db: Datalayer) -> int:
    return documents_in(db).get("mt.artifacts.files", 0)


def test_another_component_keeps_the_blobs_that_it_shares(db: Datalayer) -> None:
    db.apply(TorchModel("a", object=wide(1)))
    alone = blobs(db)
    db.apply(TorchModel("b", object=wide(2)))
    db.apply(TorchModel("a", object=wide(3)))
    assert blobs(db) < 3 * alone  # they do share

    assert db.remove("model", "a", 0) == 1

    assert same(state(db.load("model", "b")), state(wide(2)))
    assert same(state(db.load("model", "a")), state(wide(3)))
    assert db.show("model", "a") == [1]
    assert db.remove("model", "a") == 1
    assert same(state(db.load("model", "b")), state(wide(2)))
    with pytest.raises(NotFoundError):
        db.load("model", "a")
    db.gc(grace_s=0.0)
    assert blobs(db) == alone
    db.remove("model", "b")
    db.gc(grace_s=0.0)
    assert documents_in(db) == {"mt.removed": 2}  # a number for each name, so that none is used again


def test_a_publication_that_found_the_blobs_of_what_is_removed_meanwhile_is_whole(
    db: Datalayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    db.apply(TorchModel("a", object=wide(1)))
    put = BlobStore.put_all

    def put_and_lose(self: BlobStore, blobs: Any) -> list[str]:
        names = put(self, blobs)
        if "a" in db.show("model"):
            db.remove("model", "a")  # another process, between the blobs and the document
        return names

    monkeypatch.setattr(BlobStore, "put_all", put_and_lose)
    db.apply(TorchModel("b", object=wide(1)))

    assert db.show("model") == ["b"]
    assert same(state(db.load("model", "b")), state(wide(1)))


def test_a_number_that_was_removed_is_not_the_next_one_of_a_living_name(db: Datalayer) -> None:
    for seed in (0, 1, 2):
        db.apply(model(seed))

    db.remove("model", "m", 1)

    assert db.apply(model(3)).result().version == 3
    assert db.show("model", "m") == [0, 2, 3]


def test_what_another_component_refers_to_is_refused(db: Datalayer) -> None:
    metric = Metric("count", object=len)
    db.apply(Validation("v", metrics=[metric]))
    before = documents_in(db)

    for version in (0, None):
        with pytest.raises(InUseError, match="version 0 of validation 'v'"):
            db.remove("metric", "count", version)

    assert documents_in(db) == before
    assert db.remove("validation", "v") == 1
    assert db.remove("metric", "count") == 1
    assert db.show() == []


def test_force_removes_it_all_the_same(db: Datalayer) -> None:
    db.apply(Validation("v", metrics=[Metric("count", object=len)]))

    assert db.remove("metric", "count", force=True) == 1

    with pytest.raises(NotFoundError):
        db.load("validation", "v")


def test_a_trained_model_goes_with_its_trainer_and_the_untrained_one_stays(db: Datalayer) -> None:
    applied = trainer(fill(db))
    trained = db.apply(applied).result()
    with pytest.raises(InUseError, match="version 0 of trainer 't'"):
        db.remove("model", "m", 0)
    with pytest.raises(InUseError, match="version 1 of model 'm'"):
        db.remove("trainer", "t", 1)

    assert db.remove("model", "m", 1) == 1

    assert (db.show("model", "m"), db.show("trainer", "t")) == ([0], [0])
    assert same(state(db.load("model", "m")), state(model()))
    with pytest.raises(NotFoundError):
        db.load(uuid=trained.uuid)


def test_a_removed_result_is_trained_again_when_it_is_asked_for(db: Datalayer) -> None:
    applied = trainer(fill(db))
    first = db.apply(applied).result()
    weights = state(first)
    db.remove("model", "m", first.version)

    second = db.apply(applied).result()

    assert same(state(second), weights)
    assert db.load("model", "m").uuid == second.uuid


def test_all_versions_of_a_trainer_can_be_removed_after_its_models(db: Datalayer) -> None:
    db.apply(trainer(fill(db)))

    with pytest.raises(InUseError):
        db.remove("model", "m")
    db.remove("model", "m", 1)
    db.remove("trainer", "t")
    db.remove("model", "m")

    assert db.show() == []


def test_what_is_not_there_cannot_be_removed(db: Datalayer) -> None:
    db.apply(model())

    wrong: list[tuple[Any, ...]] = [("model", "n"), ("model", "m", 1), ("trainer", "m")]
    for name in wrong:
        with pytest.raises(NotFoundError):
            db.remove(*name)
    assert torch.equal(db.load("model", "m").predict([1.0] * 4), model().predict([1.0] * 4))
