"""Splits: which documents they put into which fold, in queries, streams, checks, runs and schedules."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime, timedelta
from typing import Any

import pytest

from mongotorch import Always, ByGroup, ByHash, ByTime, Datalayer, Every, KFold, Query, Schedule, Split, Worker
from mongotorch.data.read.folds import check_select, fold_of
from mongotorch.errors import FoldMissingError, ParameterError
from tests.helpers import trainer

COUNT = 600
START = datetime(2024, 1, 1)
SPLITS: list[Split | float] = [
    0.2,
    ByHash(0.3),
    ByGroup("user", 0.3),
    ByGroup("who.team", 0.4),
    ByTime("when", after=START + timedelta(hours=400)),
    ByTime("y", after=1),
    KFold(3),
    KFold(5, k=4),
]


@pytest.fixture
def filled(db: Datalayer) -> Datalayer:
    """Documents of another client, some with a stored fold, which a split does not look at."""
    db["points"].raw.insert_many(
        {
            "_id": n,
            "x": [float(n), 1.0, 2.0, 3.0],
            "y": n % 3,
            "n": n,
            "user": f"u{n % 40}",
            "who": {"team": n % 30},
            "when": START + timedelta(hours=n),
            **({"_fold": "train"} if n % 7 == 0 else {}),
        }
        for n in range(COUNT)
    )
    return db


def ids(db: Datalayer, query: Query) -> list[int]:
    return [document["_id"] for document in db.execute(query)]


@pytest.mark.parametrize("split", SPLITS, ids=repr)
@pytest.mark.parametrize("cut", [False, True])
def test_each_document_is_in_one_fold_and_all_that_read_agree(
    filled: Datalayer, split: Split | float, cut: bool
) -> None:
    query = filled["points"].find()
    query = query.sort("_id", -1).limit(500) if cut else query
    folds = {fold: ids(filled, query.fold(fold, split=split)) for fold in ("train", "valid")}
    assert all(folds.values())
    assert sorted(folds["train"] + folds["valid"]) == sorted(ids(filled, query))
    for fold in ("train", "valid"):
        with filled.stream(query, key="x", batch_size=32, fold=fold, split=split) as stream:
            assert [int(row[0]) for batch in stream for row in batch] == folds[fold]
    folded = query.fold("train", split=split)
    assert Query.from_document(folded.to_document()) == folded
    assert folded.digest() != query.fold("train").digest()


def test_a_share_is_that_of_assign_folds(filled: Datalayer) -> None:
    wanted = [n for n in range(COUNT) if fold_of(n, 0.2) == "valid"]
    assert ids(filled, filled["points"].find().fold("valid", split=0.2)) == wanted


def test_documents_of_one_group_are_in_one_fold(filled: Datalayer) -> None:
    filled["points"].raw.insert_many([{"_id": 1000 + n} for n in range(20)])
    folds = defaultdict(set)
    for fold in ("train", "valid"):
        for document in filled.execute(filled["points"].find().fold(fold, split=ByGroup("user", 0.3))):
            folds[document.get("user")].add(fold)
    assert len(folds) == 41
    assert {len(found) for found in folds.values()} == {1}


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_the_parts_of_a_kfold_are_a_partition(filled: Datalayer, parts: int) -> None:
    found = [ids(filled, filled["points"].find().fold("valid", split=KFold(parts, k))) for k in range(parts)]
    assert sorted(n for part in found for n in part) == list(range(COUNT))
    assert min(map(len, found)) > COUNT / parts * 0.6


def test_a_time_divides_before_and_after(filled: Datalayer) -> None:
    split = ByTime("when", after=START + timedelta(hours=400))
    assert ids(filled, filled["points"].find().fold("train", split=split)) == list(range(401))
    assert ids(filled, filled["points"].find().fold("valid", split=split)) == list(range(401, COUNT))


@pytest.mark.parametrize("other", [{}, {"when": "2024-01-05"}, {"when": None}])
def test_a_document_that_no_time_divides_is_refused(filled: Datalayer, other: dict[str, Any]) -> None:
    filled["points"].raw.insert_one({"_id": 999, "x": [0.0] * 4, "y": 0, **other})
    split = ByTime("when", after=START)
    for select in (filled["points"].find(), filled["points"].find().skip(3)):
        with pytest.raises(FoldMissingError) as caught:
            check_select(filled["points"].raw.database, select.fold("train", split=split))
        assert (caught.value.document_id, caught.value.field) == (999, "when")
    job = filled.apply(trainer(filled["points"].find(), split=split))
    assert isinstance(job.exception(), FoldMissingError)


def test_an_array_on_both_sides_of_a_time_is_in_one_fold(filled: Datalayer) -> None:
    filled["points"].raw.insert_one({"_id": 999, "y": [0, 2]})
    folds = {
        fold: ids(filled, filled["points"].find().fold(fold, split=ByTime("y", 1))) for fold in ("train", "valid")
    }
    assert 999 in folds["valid"]
    assert 999 not in folds["train"]


@pytest.mark.parametrize("split", SPLITS, ids=repr)
def test_a_run_is_divided_by_the_split_of_its_trainer(filled: Datalayer, split: Split | float) -> None:
    before = list(filled["points"].raw.find().sort("_id", 1))
    applied = trainer(filled["points"].find(), split=split, max_iterations=3)
    model = filled.apply(applied).result()
    data = filled.show("model", model.identifier, model.version)["data"]
    query = filled["points"].find()
    for fold in ("train", "valid"):
        assert data[fold]["count"] == len(ids(filled, query.fold(fold, split=split)))
    assert Query.from_document(data["query"]) == query.fold("train", split=split)
    stored = filled.load("trainer", applied.identifier, 0)
    assert stored.split == split
    assert list(filled["points"].raw.find().sort("_id", 1)) == before
    checked = filled.check(applied)
    assert set(checked.folds) == {"train", "valid"}
    assert filled.reproduce(model.uuid).same


def test_a_schedule_judges_on_the_valid_documents_of_the_split(filled: Datalayer) -> None:
    split = ByGroup("user", 0.3)
    applied = trainer(filled["points"].find(), split=split, max_iterations=3)
    filled.apply(Schedule("s", trainer=applied, trigger=Every(seconds=1e6), gate=Always()))
    filled.promote("model", "m", 0)
    filled.fire("s")
    Worker(filled).run(until_idle=True)
    data = filled.show("model", "m", 1)["data"]
    assert data["valid"]["count"] == len(ids(filled, filled["points"].find().fold("valid", split=split)))
    assert data["train"]["count"] == len(ids(filled, filled["points"].find().fold("train", split=split)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ByHash(1.5),
        lambda: ByHash(True),
        lambda: ByHash("much"),  # type: ignore[arg-type]
        lambda: ByGroup(""),
        lambda: ByGroup("$user"),
        lambda: ByGroup("user", -0.1),
        lambda: ByTime("when", after=None),
        lambda: ByTime("when", after=[1]),
        lambda: KFold(1),
        lambda: KFold(5, k=5),
        lambda: KFold(5, k=-1),
        lambda: KFold(2.5),  # type: ignore[arg-type]
        lambda: Query.find("c").fold("train", split="valid"),  # type: ignore[arg-type]
        lambda: trainer(Query.find("c"), split="valid"),
        lambda: trainer(Query.find("c"), split=2.0),
    ],
)
def test_what_divides_nothing_is_refused(make: Any) -> None:
    with pytest.raises(ParameterError):
        make()
