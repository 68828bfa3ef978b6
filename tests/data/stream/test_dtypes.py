"""A field has one dtype for a whole run: in every window, fold, mode and worker, and where a stream goes on."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from bson import Int64
from tests.helpers import same, trainer

from mongotorch import Datalayer
from mongotorch.errors import DtypeError, ParameterError


def fill(db: Datalayer, values: list[Any], **fields: Any) -> Any:
    db["numbers"].raw.insert_many([{"_id": n, "x": value, "y": n % 3, **fields} for n, value in enumerate(values)])
    return db["numbers"].find()


def batches(db: Datalayer, query: Any, **given: Any) -> list[Any]:
    options: dict[str, Any] = {"key": ("x", "y"), "batch_size": 64, "prefetch_size": 100, **given}
    with db.stream(query, **options) as stream:
        return list(stream)


def late_float(count: int = 2200) -> list[Any]:
    """Integers, and floats only behind the first 2,100: more than the documents at one end that decide."""
    return [[n, n % 7] if n < 2100 else [n / 3, n % 7] for n in range(count)]


@pytest.mark.parametrize("options", [{}, {"prefetch_size": 10_000}, {"in_memory": True}, {"download": True}])
@pytest.mark.parametrize("shuffle", [False, True])
def test_floats_behind_thousands_of_integers_make_all_floats(
    db: Datalayer, options: dict[str, Any], shuffle: bool
) -> None:
    query = fill(db, late_float())
    found = batches(db, query, shuffle=shuffle, **options)
    assert {x.dtype for x, _ in found} == {torch.float32}
    assert {y.dtype for _, y in found} == {torch.int64}
    if not shuffle:
        assert torch.equal(torch.cat([x for x, _ in found]), torch.tensor(late_float(), dtype=torch.float32))


def test_all_modes_and_workers_give_equal_tensors(db: Datalayer, uri: str) -> None:
    query = fill(db, late_float())
    modes: list[dict[str, Any]] = [{"in_memory": True}, {"download": True}, {"data_prefetch": False}]
    modes += [{"num_workers": 2}] if uri.startswith("mongodb:") else []
    wanted = batches(db, query, shuffle=True, seed=3)
    assert all(same(batches(db, query, shuffle=True, seed=3, **mode), wanted) for mode in modes)


def test_floats_in_one_fold_only_make_floats_of_both(db: Datalayer) -> None:
    rows = [{"_id": n, "_fold": "valid" if n % 4 == 0 else "train"} for n in range(400)]
    documents = [{**row, "x": [n / 2 if n % 4 == 0 else n], "y": 0} for n, row in enumerate(rows)]
    db["numbers"].raw.insert_many(documents)
    for fold in ("train", "valid"):
        found = batches(db, db["numbers"].find().fold(fold))
        assert {x.dtype for x, _ in found} == {torch.float32}, fold


def test_only_documents_within_a_limit_decide(db: Datalayer) -> None:
    query = fill(db, [*[0.5] * 100, *range(100)])
    for limited in (query.sort("_id", -1).limit(50), query.sort("_id").skip(150)):
        assert {x.dtype for x, _ in batches(db, limited)} == {torch.int64}


def test_a_transform_gets_the_numbers_of_the_run(db: Datalayer) -> None:
    query = fill(db, [n if n % 2 else n / 2 for n in range(200)])
    seen: list[Any] = []

    def transform(x: Any, y: Any) -> Any:
        seen.extend([type(x), type(y)])
        return x, y

    found = batches(db, query, transform=transform)
    assert set(seen[::2]) == {float}
    assert set(seen[1::2]) == {int}
    assert {x.dtype for x, _ in found} == {torch.float32}


def test_ragged_lists_have_one_type(db: Datalayer) -> None:
    draw = random.Random(0)
    query = fill(db, [[draw.choice([1, 0.5]) for _ in range(draw.randrange(5))] for _ in range(300)])
    found = batches(db, query, collate_fn=lambda samples: {type(v) for x, _ in samples for v in x})
    assert set().union(*found) == {float}


def test_a_number_that_fits_is_promoted(db: Datalayer) -> None:
    """Beyond the sample: integers in a field of floats, whole floats in one of integers."""
    floats = [0.5] * 9000
    integers: list[Any] = [1] * 9000
    floats[4500], integers[4500] = 7, 7.0
    db["numbers"].raw.insert_many([{"_id": n, "x": floats[n], "y": integers[n]} for n in range(9000)])
    found = batches(db, db["numbers"].find())
    assert {(x.dtype, y.dtype) for x, y in found} == {(torch.float32, torch.int64)}
    assert torch.cat([x for x, _ in found])[4500] == 7
    assert torch.cat([y for _, y in found])[4500] == 7


@pytest.mark.parametrize(("usual", "odd"), [(1, 0.5), ([1, 2], [1, 0.5]), (0.5, Int64(2**53 + 1)), (True, 2)])
def test_a_number_that_does_not_fit_is_named(db: Datalayer, usual: Any, odd: Any) -> None:
    values = [usual] * 9000
    values[4500] = odd
    query = fill(db, values)
    with pytest.raises(DtypeError, match="document 4500") as caught:
        batches(db, query)
    assert (caught.value.document_id, caught.value.field) == (4500, "x")
    dtype = "float64"
    assert {x.dtype for x, _ in batches(db, query, dtypes={"x": dtype})} == {torch.float64}


def test_a_dtype_that_is_given_is_the_one(db: Datalayer) -> None:
    query = fill(db, [n if n % 2 else n / 2 for n in range(200)])
    for name in ("float16", "float32", "float64"):
        found = batches(db, query, dtypes={"x": name, "y": "int32"})
        assert {x.dtype for x, _ in found} == {getattr(torch, name)}
        assert {y.dtype for _, y in found} == {torch.int32}
        built = batches(db, query, dtypes={"x": name}, transform=lambda x, y: (x, y))
        assert {x.dtype for x, _ in built} == {getattr(torch, name)}
    with pytest.raises(DtypeError, match=r"holds 0[.]5"):
        batches(db, fill_more(db), dtypes={"x": "int32"})


def fill_more(db: Datalayer) -> Any:
    db["more"].raw.insert_many([{"_id": n, "x": n / 2, "y": 0} for n in range(9)])
    return db["more"].find()


@pytest.mark.parametrize("name", ["float32", "float16", "int32", "uint8", "int64"])
@pytest.mark.parametrize("options", [{}, {"prefetch_size": 7}, {"in_memory": True, "shuffle": True}])
def test_lists_of_unequal_length_have_the_dtype_that_is_given(
    db: Datalayer, name: str, options: dict[str, Any]
) -> None:
    values = [[n, n % 7, 1] if n < 20 else [n % 9, n] for n in range(40)]
    query, dtypes = fill(db, values), {"x": name}
    if not options.get("shuffle"):
        found = batches(db, query, batch_size=20, dtypes=dtypes, **options)
        assert [x.tolist() for x, _ in found] == [values[:20], values[20:]]
        assert {x.dtype for x, _ in found} == {getattr(torch, name)}
    rows: list[Any] = []

    def keep(x: Any, y: Any) -> Any:
        rows.append(x)
        return y, y

    batches(db, query, batch_size=8, dtypes=dtypes, transform=keep, **options)
    assert sorted([float(one) for one in row] for row in rows) == sorted([[*map(float, row)] for row in values])


@pytest.mark.parametrize("dtypes", [{"z": "float32"}, {"x": "floaty"}, {"x": "complex64"}, ["x"]])
def test_a_dtype_that_cannot_be_is_refused(db: Datalayer, dtypes: Any) -> None:
    query = fill(db, [1])
    with pytest.raises(ParameterError) as caught:
        batches(db, query, dtypes=dtypes)
    assert caught.value.field == "dtypes"
    with pytest.raises(ParameterError):
        trainer(query, dtypes=dtypes)


@pytest.mark.parametrize("limit", [None, 150])
def test_a_stream_that_goes_on_keeps_its_dtypes(db: Datalayer, limit: int | None) -> None:
    query = fill(db, list(range(200)))
    query = query if limit is None else query.limit(limit)
    options: dict[str, Any] = {"key": ("x", "y"), "batch_size": 50}
    with db.stream(query, **options) as stream:
        first = next(iter(stream))
        state = stream.state_dict()
    db["numbers"].raw.update_many({"_id": {"$gte": 140}}, {"$set": {"x": 8.0}})
    with db.stream(query, **options) as stream:
        stream.load_state_dict(state)
        assert {x.dtype for x, _ in stream} == {first[0].dtype} == {torch.int64}
    db["numbers"].raw.update_many({"_id": {"$gte": 140}}, {"$set": {"x": 8.5}})
    with db.stream(query, **options) as stream:
        stream.load_state_dict(state)
        with pytest.raises(DtypeError, match="document 140"):
            list(stream)
        del state["dtypes"]  # as earlier releases wrote it
        stream.load_state_dict(state)


def test_a_trainer_reads_both_folds_in_one_dtype(db: Datalayer) -> None:
    rows = [{"_id": n, "_fold": "valid" if n % 4 == 0 else "train"} for n in range(200)]
    documents = [{**row, "x": [n / 2 if n == 100 else 1, 1, 2, 3], "y": n % 3} for n, row in enumerate(rows)]
    db["points"].raw.insert_many(documents)
    job = db.apply(trainer(db["points"].find(), dtypes={"y": "int64"}))
    assert job.result().version == 1
    assert db.load("trainer", "t").dtypes == {"y": "int64"}


@pytest.mark.parametrize("options", [{}, {"in_memory": True}, {"download": True}, {"shuffle": True}])
def test_optional_fields_have_their_default(db: Datalayer, options: dict[str, Any]) -> None:
    draw = random.Random(0)
    documents: list[dict[str, Any]] = []
    for n in range(500):
        optional = {"age": draw.choice([n, None]), "text": {"words": [n, 1]}, "sure": draw.random() < 0.5}
        documents.append({"_id": n, "y": n, **{name: v for name, v in optional.items() if draw.random() < 0.6}})
    db["people"].raw.insert_many(documents)
    key = ("y", "age", "text.words", "sure")
    defaults: dict[str, Any] = {"age": -1.5, "text.words": [0, 0], "sure": False}
    found = batches(db, db["people"].find(), key=key, defaults=defaults, dtypes={"sure": "bool"}, **options)
    columns = [torch.cat(parts) for parts in zip(*found, strict=True)]
    assert [column.dtype for column in columns] == [torch.int64, torch.float32, torch.int64, torch.bool]
    wanted = {}
    for one in documents:
        age = -1.5 if one.get("age") is None else float(one["age"])
        wanted[one["_id"]] = (age, one.get("text", {}).get("words", [0, 0]), one.get("sure", False))
    rows = {y: tuple(rest) for y, *rest in zip(*[column.tolist() for column in columns], strict=True)}
    assert rows == wanted


def test_a_default_of_another_type_makes_the_field_floats(db: Datalayer) -> None:
    query = fill(db, [1] * 100)
    found = batches(db, query, key=("x", "age"), defaults={"age": float("nan"), "x": 0.5})
    assert {(x.dtype, age.dtype) for x, age in found} == {(torch.float32, torch.float32)}
    assert all(age.isnan().all() for _, age in found)


@pytest.mark.parametrize("defaults", [{"z": 1}, {"x": object()}, {"x": None}, [1]])
def test_a_default_that_cannot_be_is_refused(db: Datalayer, defaults: Any) -> None:
    query = fill(db, [1])
    with pytest.raises(ParameterError) as caught:
        batches(db, query, defaults=defaults)
    assert caught.value.field == "defaults"
    with pytest.raises(ParameterError):
        trainer(query, defaults=defaults)
