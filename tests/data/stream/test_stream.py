"""The guarantees of the stream, on both backends: the same batches whatever the settings."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import torch
from bson import Binary, ObjectId
from bson.binary import BinaryVectorDtype
from torch.utils.data import DataLoader

import mongotorch
from mongotorch import Datalayer
from mongotorch.data import Stream, StreamSpec, assign_folds, check_select, fold_of
from mongotorch.data.stream import cache, windows
from mongotorch.errors import (
    DataError,
    EmptyFoldError,
    EmptySelectError,
    FieldMissingError,
    QueryError,
    ShapeError,
)
from mongotorch.mongo.connection import open_address
from mongotorch.query import Query
from mongotorch.settings import read_settings

COUNT = 1009
MOST_FILES = 22  # of the package, that the first epoch of a stream runs through
SELECT = Query.find("documents", {"y": {"$gte": 0}})
QUERIES = {
    "by id": SELECT,
    "sorted": SELECT.sort("y"),
    "limited": SELECT.sort("y", -1).skip(7).limit(700),
    "pipeline": Query.aggregate("documents", [{"$match": {"y": {"$gte": 9}}}, {"$sort": {"y": 1}}]),
}
WAYS: dict[str, dict[str, Any]] = {
    "prefetch": {"data_prefetch": True},
    "memory": {"mode": "memory"},
    "download": {"mode": "download"},
    "workers": {"loader": {"num_workers": 2}},
}

Make = Callable[..., Stream]


def identity(n: int) -> Any:
    kinds = [n, f"name-{n}", ObjectId(n.to_bytes(12, "big")), n + 0.5, {"n": n}]
    return kinds[n % len(kinds)]


def document(n: int) -> dict[str, Any]:
    vector = Binary.from_vector([float(n)] * 4, BinaryVectorDtype.FLOAT32)
    return {"_id": identity(n), "x": [float(n), n / 2], "y": n, "v": vector, "_fold": "train"}


@pytest.fixture
def documents(database: Any) -> Any:
    database["documents"].insert_many([document(n * 37 % COUNT) for n in range(COUNT)])
    return database["documents"]


@pytest.fixture
def make(uri: str, database: Any, tmp_path: Path) -> Iterator[Make]:
    """Makes streams that open the database themselves, and closes them."""
    streams: list[Stream] = []
    with open_address(uri, read_settings()) as connection:
        opener = connection.opener

    def stream(**given: Any) -> Stream:
        small = {
            "batch_size": 64,
            "prefetch_size": 50,
            "prefetch_factor": 7,
            "seed": 5,
            "cache_dir": tmp_path,
        }
        spec = StreamSpec(**{"query": SELECT, "key": ("x", "y", "v"), **small, **given})
        streams.append(Stream(opener, spec))
        return streams[-1]

    yield stream
    for made in streams:
        made.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mongotorch-prefetch")]


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def labels(batches: list[Any], at: int = 1) -> list[int]:
    return [int(label) for batch in batches for label in batch[at]]


def add(x: list[float], y: int, v: torch.Tensor) -> tuple[torch.Tensor, int]:
    return v + x[0] + y, y


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", QUERIES)
def test_every_way_yields_the_same_batches(documents: Any, make: Make, name: str, way: str, shuffle: bool) -> None:
    plain = make(query=QUERIES[name], shuffle=shuffle)
    other = make(query=QUERIES[name], shuffle=shuffle, **WAYS[way])
    for _ in range(2):
        expected = list(plain)
        assert same(list(other), expected)
        assert len(set(labels(expected))) == len(labels(expected))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_documents_of_several_layouts_are_the_same_in_every_way(
    documents: Any, make: Make, way: str, shuffle: bool
) -> None:
    documents.update_many({"y": {"$gte": 400, "$lt": 420}}, {"$set": {"x": [1, 2]}})
    documents.update_many({"y": 800}, {"$set": {"v": [0.5] * 4}})
    expected = list(make(shuffle=shuffle))
    other = make(shuffle=shuffle, **WAYS[way])
    assert same(list(other), expected)
    rows = {int(label): row.tolist() for x, y, _ in expected for row, label in zip(x, y, strict=True)}
    assert rows[410] == [1.0, 2.0]
    assert rows[500] == [500.0, 250.0]
    batches = iter(make(shuffle=shuffle, **WAYS[way]))
    assert same([next(batches) for _ in range(9)], expected[:9])


@pytest.mark.parametrize("way", WAYS)
def test_samples_come_in_the_same_order_in_every_way(documents: Any, make: Make, way: str) -> None:
    plain = list(make(shuffle=True, transform=add))
    assert same(list(make(shuffle=True, transform=add, **WAYS[way])), plain)
    assert same([batch[1] for batch in plain], [batch[1] for batch in make(shuffle=True)])


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_document_comes_once_an_epoch(documents: Any, make: Make, shuffle: bool) -> None:
    stream = make(shuffle=shuffle)
    first, second = labels(list(stream)), labels(list(stream))
    assert sorted(first) == sorted(second) == list(range(COUNT))
    assert (first == second) is not shuffle
    assert first != sorted(first)


def test_batches_hold_the_values_of_their_documents_in_the_promised_dtypes(documents: Any, make: Make) -> None:
    for x, y, v in make(shuffle=True):
        assert (x.dtype, y.dtype, v.dtype) == (torch.float32, torch.int64, torch.float32)
        assert torch.equal(x, torch.stack([y.float(), y.float() / 2], dim=1))
        assert torch.equal(v, y.float()[:, None].expand(-1, 4))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(
    "changed",
    [
        {"data_prefetch": True, "prefetch_size": 333, "prefetch_factor": 2},
        {"loader": {"num_workers": 1}},
        {"mode": "memory", "prefetch_size": 20},
    ],
)
def test_a_resumed_stream_yields_the_tail_under_other_settings(
    documents: Any, make: Make, shuffle: bool, changed: dict[str, Any]
) -> None:
    whole = make(shuffle=shuffle)
    first, second = list(whole), list(whole)
    for position in (1, 6, 11, 15):
        stopped = make(shuffle=shuffle)
        batches = iter(stopped)
        for _ in range(position):
            next(batches)
        state = json.dumps(stopped.state_dict())
        assert len(state) < 1024
        resumed = make(shuffle=shuffle, seed=99, **changed)
        resumed.load_state_dict(json.loads(state))
        assert same(list(resumed), first[position:])
        assert same(list(resumed), second)


@pytest.mark.parametrize("name", ["limited", "pipeline"])
def test_queries_with_an_order_of_their_own_resume_too(documents: Any, make: Make, name: str) -> None:
    whole = list(make(query=QUERIES[name], shuffle=True))
    stopped = make(query=QUERIES[name], shuffle=True)
    batches = iter(stopped)
    for _ in range(7):
        next(batches)
    resumed = make(query=QUERIES[name], shuffle=True, prefetch_size=200)
    resumed.load_state_dict(stopped.state_dict())
    assert same(list(resumed), whole[7:])


def test_documents_deleted_in_between_do_not_move_the_others(documents: Any, make: Make) -> None:
    stream = make(shuffle=True)
    before = labels(list(stream))
    documents.delete_many({"y": {"$in": [5, 500, 900]}})
    state = {**stream.state_dict(), "epoch": 0}
    again = make(shuffle=True)
    again.load_state_dict(state)
    assert labels(list(again)) == [label for label in before if label not in (5, 500, 900)]


WAYS_OF_READING: dict[str, dict[str, Any]] = {"stream": {}, **{way: WAYS[way] for way in ("memory", "download")}}


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("way", WAYS_OF_READING)
def test_resume_is_exact_after_deletions_and_insertions_around_the_position(
    documents: Any, make: Make, way: str, shuffle: bool
) -> None:
    """Rows that lie before the position go, the very last one too, and others come: the tail stays the tail."""
    stopped = make(shuffle=shuffle, **WAYS_OF_READING[way])
    batches = iter(stopped)
    before = labels([next(batches) for _ in range(6)])
    state = json.loads(json.dumps(stopped.state_dict()))
    after = labels(list(batches))
    gone = {*before[-40:], *before[:3], after[0], after[-1]}
    documents.delete_many({"y": {"$in": sorted(gone)}})
    newer = [{**document(n), "_id": identity(n), "y": n} for n in (COUNT + 1, COUNT + 2)]
    documents.insert_many([{**one, "_id": one["_id"]} for one in newer])
    resumed = make(shuffle=shuffle, **WAYS_OF_READING[way])
    resumed.load_state_dict(state)
    tail = [label for label in labels(list(resumed)) if label < COUNT]
    assert tail == [label for label in after if label not in gone]


def test_documents_that_are_gone_or_late_are_counted(documents: Any, make: Make) -> None:
    stream = make(shuffle=True)
    list(stream)
    assert (stream.report.rows, stream.report.gone, stream.report.late) == (COUNT, 0, 0)
    documents.delete_many({"y": {"$in": [4, 5, 500, 900]}})
    list(stream)
    assert (stream.report.epoch, stream.report.rows, stream.report.gone) == (1, COUNT - 4, 4)
    documents.insert_one(document(4))
    list(stream)
    assert (stream.report.rows, stream.report.gone) == (COUNT - 3, 3)


def test_a_document_inside_the_bounds_that_comes_late_is_counted_and_comes_once_at_most(
    documents: Any, make: Make
) -> None:
    stream = make(shuffle=True)
    batches = iter(stream)
    seen = labels([next(batches)])
    late = [{**document(0), "_id": {"n": n + 0.5}, "y": COUNT + n} for n in range(200)]
    documents.insert_many(late)
    seen += labels(list(batches))
    assert sorted(label for label in seen if label < COUNT) == list(range(COUNT))
    assert len(seen) == len(set(seen))
    assert stream.report.late == len(seen) - COUNT
    assert len(labels(list(stream))) == COUNT + 200


def test_a_later_document_belongs_to_the_next_run(documents: Any, make: Make) -> None:
    stream = make(shuffle=True)
    next(iter(stream))
    documents.insert_one({**document(3), "_id": ObjectId(b"\xff" * 12), "y": 10**6})
    assert 10**6 not in labels(list(stream))
    assert 10**6 in labels(list(make(shuffle=True)))


def test_shards_are_disjoint_and_take_equal_steps(documents: Any, make: Make) -> None:
    shards = [list(make(shuffle=True, shard=(rank, 4))) for rank in range(4)]
    assert len({len(shard) for shard in shards}) == 1
    together = [label for shard in shards for label in labels(shard)]
    assert len(together) == len(set(together)) > COUNT - 4


@pytest.mark.parametrize("shard_by", ["rows", "batches"])
@pytest.mark.parametrize(("batch_size", "drop_last"), [(500, False), (500, True), (300, False)])
def test_a_shard_is_as_long_as_it_says(
    documents: Any, make: Make, shard_by: str, batch_size: int, drop_last: bool
) -> None:
    for rank in range(2):
        shard = make(shard=(rank, 2), shard_by=shard_by, batch_size=batch_size, drop_last=drop_last)
        assert len(shard) == len(list(shard))


def test_workers_of_a_users_loader_take_turns_in_the_same_batches(documents: Any, make: Make) -> None:
    expected = list(make(shuffle=True))
    loader = DataLoader(make(shuffle=True), batch_size=None, num_workers=2)
    assert same([tuple(batch) for batch in loader], expected)


def test_the_global_generator_is_not_touched(documents: Any, make: Make) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    list(make(shuffle=True, loader={"num_workers": 1}))
    list(make(shuffle=True, transform=add, loader={"num_workers": 1}))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_download_is_read_once_and_again_after_a_change(documents: Any, make: Make, tmp_path: Path) -> None:
    first = list(make(mode="download", shuffle=True))
    (cached,) = (path.stat() for path in tmp_path.glob("*/meta.json"))
    assert same(list(make(mode="download", shuffle=True)), first)
    (again,) = (path.stat() for path in tmp_path.glob("*/meta.json"))
    assert (again.st_ino, again.st_mtime_ns) == (cached.st_ino, cached.st_mtime_ns)
    documents.delete_many({"y": 5})
    assert 5 not in labels(list(make(mode="download", shuffle=True)))


def test_a_download_that_another_process_has_finished_meanwhile_is_used(
    documents: Any, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = cache._rename

    def rename_after_another(building: Path, target: Path) -> None:
        shutil.copytree(building, target)
        rename(building, target)

    monkeypatch.setattr(cache, "_rename", rename_after_another)
    assert same(list(make(mode="download", shuffle=True)), list(make(shuffle=True)))


@pytest.mark.parametrize("query", QUERIES)
def test_a_download_is_of_the_documents_as_they_are_now(documents: Any, make: Make, query: str) -> None:
    wanted: dict[str, Any] = {"query": QUERIES[query], "mode": "download", "key": ("x", "v", "y")}
    stale = list(make(**wanted))
    assert same(list(make(**wanted)), stale)
    documents.update_one({"y": 700}, {"$set": {"x": [-1.0, -2.0]}})  # the same `_id`, count, size and shape
    fresh = list(make(**wanted))
    assert same(fresh, list(make(**{**wanted, "mode": "stream"})))
    assert not same(fresh, stale)
    documents.update_one({"y": 700}, {"$set": {"x": [700.0, 350.0]}})
    assert same(list(make(**wanted)), stale), "the earlier one is found again, for it is the same content"
    documents.update_one({"y": 700}, {"$set": {"not a field of the key": 1}})
    assert same(list(make(**wanted)), stale)


def test_a_download_that_others_write_into_never_has_the_name_of_what_was_there_before(
    documents: Any, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = list(make(mode="download"))
    documents.update_one({"y": 700}, {"$set": {"x": [-1.0, -2.0]}})
    scanned = windows.content_of

    def scan_then_change(*given: Any) -> str:
        found = scanned(*given)
        documents.update_one({"y": 701}, {"$set": {"x": [-3.0, -4.0]}})
        return found

    monkeypatch.setattr("mongotorch.data.stream.epochs.content_of", scan_then_change)
    changed = list(make(mode="download"))
    monkeypatch.undo()
    documents.update_one({"y": 701}, {"$set": {"x": [701.0, 350.5]}})
    again = list(make(mode="download"))
    assert same(again, list(make())), "not what was downloaded while it was otherwise"
    assert not same(again, changed)
    assert not same(again, before)


def test_what_a_killed_download_leaves_is_removed_by_the_next(
    documents: Any, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
        import os, sys, tempfile
        from pathlib import Path
        from mongotorch.data.stream import cache
        with cache.working_folder(Path(sys.argv[1])) as building:
            (building / "field-0").write_bytes(bytes(100))
            print(building, flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        building = Path(process.stdout.readline().strip())
        os.utime(building, (0, 0))
        list(make(mode="download"))
        assert building.exists(), "its process is alive"
        process.kill()
        process.wait()
    documents.delete_many({"y": 5})
    list(make(mode="download"))
    assert not building.exists()
    assert list(tmp_path.glob(".*")) == []


def test_a_batch_that_is_changed_does_not_change_what_is_held(documents: Any, make: Make) -> None:
    for shuffle in (False, True):
        stream = make(mode="memory", shuffle=shuffle)
        for x, _, _ in stream:
            x.zero_()
        for x, y, _ in stream:
            assert torch.equal(x[:, 0], y.float())


@pytest.mark.parametrize("uri", ["mongod"], indirect=True)
def test_an_epoch_can_be_followed_through_few_files(documents: Any, make: Make) -> None:
    package, entered = str(Path(mongotorch.__file__).parent), set()

    def note(frame: Any, event: str, _argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            entered.add(frame.f_code.co_filename.removeprefix(package))

    stream = make(data_prefetch=True, shuffle=True)
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        batches = list(stream)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert len(labels(batches)) == COUNT
    assert len(entered) <= MOST_FILES, sorted(entered)


def test_a_last_short_batch_is_kept_or_dropped(documents: Any, make: Make) -> None:
    assert [len(y) for _, y, _ in make(batch_size=500)] == [500, 500, 9]
    assert [len(y) for _, y, _ in make(batch_size=500, drop_last=True)] == [500, 500]
    with pytest.raises(DataError):
        list(make(batch_size=5000, drop_last=True))


def test_a_select_with_a_limit_or_a_skip_is_as_long_as_it_says(documents: Any, make: Make) -> None:
    for query, rows in ((SELECT.sort("y", -1).limit(7), 7), (SELECT.sort("y").skip(COUNT - 5), 5)):
        stream = make(query=query, batch_size=1)
        assert len(stream) == len(list(stream)) == rows


def test_an_iteration_can_be_left_and_closed(documents: Any, make: Make) -> None:
    stream = make(data_prefetch=True, loader={"num_workers": 0})
    next(iter(stream))
    stream.close()
    assert len(list(stream)) == 16


@pytest.mark.parametrize("way", [{}, *WAYS.values()])
def test_a_missing_field_is_named_with_its_document(documents: Any, make: Make, way: dict[str, Any]) -> None:
    documents.update_one({"y": 700}, {"$unset": {"x": ""}})
    with pytest.raises(FieldMissingError) as caught:
        list(make(**way))
    assert (caught.value.field, caught.value.document_id) == ("x", identity(700))


def test_ragged_values_are_named_with_their_document(documents: Any, make: Make) -> None:
    documents.update_one({"y": 700}, {"$set": {"x": [1.0]}})
    with pytest.raises(ShapeError) as caught:
        list(make(shuffle=True))
    assert caught.value.field == "x"


def test_text_is_refused_as_a_tensor_and_welcome_in_a_transform(documents: Any, make: Make) -> None:
    documents.update_many({}, {"$set": {"x": "words"}})
    with pytest.raises(DataError) as caught:
        list(make(key=("x", "y")))
    assert caught.value.field == "x"
    batches = list(make(key=("x", "y"), transform=lambda x, y: (len(x), y)))
    assert batches[0][0].tolist() == [5] * 64


def test_an_empty_select_is_refused(database: Any, make: Make) -> None:
    for query in (SELECT, SELECT.sort("y"), QUERIES["pipeline"]):
        with pytest.raises(EmptySelectError):
            list(make(query=query))
        with pytest.raises(EmptySelectError):
            check_select(database, query)


def test_folds_are_checked_and_assigned(documents: Any, database: Any) -> None:
    with pytest.raises(EmptyFoldError):
        check_select(database, SELECT)
    check_select(database, SELECT, folds=("train",))
    documents.update_many({}, {"$unset": {"_fold": ""}})
    check_select(database, SELECT)
    assert assign_folds(documents, 0.2) == COUNT
    for found in documents.find({}, {"_fold": 1}):
        assert found["_fold"] == fold_of(found["_id"], 0.2)
    check_select(database, SELECT)


def test_folds_set_by_hand_or_under_another_fraction_are_kept(documents: Any) -> None:
    documents.update_many({}, {"$unset": {"_fold": ""}})
    assign_folds(documents, 0.5)
    by_hand = {"valid": [identity(n) for n in range(40)], "train": [identity(n) for n in range(40, 80)]}
    for fold, ids in by_hand.items():
        documents.update_many({"_id": {"$in": ids}}, {"$set": {"_fold": fold}})
    documents.insert_many([{"_id": f"new-{n}", "y": n} for n in range(50)])
    documents.update_one({"_id": "new-7"}, {"$set": {"_fold": "neither"}})
    before = {
        str(found["_id"]): found["_fold"] for found in documents.find({"_fold": {"$in": ["train", "valid"]}})
    }
    assert assign_folds(documents, 0.05) == 50
    after = {str(found["_id"]): found["_fold"] for found in documents.find()}
    assert {key: after[key] for key in before} == before
    assert {key: fold for key, fold in after.items() if key not in before} == {
        f"new-{n}": fold_of(f"new-{n}", 0.05) for n in range(50)
    }


def test_a_computed_projection_is_shuffled_whether_or_not_it_gives_the_id(mongod: str) -> None:
    with Datalayer.connect(f"mongodb://{mongod}/computed{uuid4().hex[:8]}", progress=False) as db:
        db["c"].raw.insert_many([{"_id": n, "n": n} for n in range(100)])

        def read(projection: dict[str, Any], *, shuffle: bool) -> list[int]:
            select = Query.find("c", {}, projection)
            with db.stream(select, key="twice", batch_size=10, shuffle=shuffle, seed=3) as stream:
                return [value for batch in stream for value in batch.tolist()]

        twice = {"twice": {"$multiply": ["$n", 2]}}
        shuffled = read(twice, shuffle=True)
        assert read(twice, shuffle=False) == [2 * n for n in range(100)]
        assert sorted(shuffled) == [2 * n for n in range(100)]
        assert shuffled != sorted(shuffled)
        assert read({"_id": 0, **twice}, shuffle=True) == shuffled
        with pytest.raises(QueryError, match="computes `_id`"):
            read({**twice, "_id": {"$multiply": ["$n", -1]}}, shuffle=True)
        db["c"].raw.database.client.drop_database(db["c"].raw.database.name)


@pytest.mark.parametrize("compound", [False, True])
def test_documents_with_uuids_are_streamed_shuffled_and_resumed(mongod: str, compound: bool) -> None:
    with Datalayer.connect(f"mongodb://{mongod}/uuids{uuid4().hex[:8]}", progress=False) as db:
        ids: list[Any] = [UUID(int=n * 7919) for n in range(300)]
        ids = [{"shop": one, "n": n} for n, one in enumerate(ids)] if compound else ids
        db["c"].insert_many([{"_id": one, "n": n, "owner": ids[0]} for n, one in enumerate(ids)])
        options: dict[str, Any] = {"key": "n", "batch_size": 32, "shuffle": True, "prefetch_size": 40}
        with db.stream(db["c"].find({"owner": ids[0]}), **options) as stream:
            batches = iter(stream)
            first = [value for _ in range(4) for value in next(batches).tolist()]
            state = json.loads(json.dumps(stream.state_dict()))
        with db.stream(db["c"].find({"owner": ids[0]}), **options) as stream:
            stream.load_state_dict(state)
            rest = [value for batch in stream for value in batch.tolist()]
        assert sorted(first + rest) == list(range(300))
        assert first != sorted(first)
        db["c"].raw.database.client.drop_database(db["c"].raw.database.name)
