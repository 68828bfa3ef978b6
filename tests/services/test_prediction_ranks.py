"""Predictions by several processes: the same documents and bits as by one, also where one of them is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import processes_left as left
from tests import run_processes as runs
from torch import Tensor, nn

from mongotorch import Datalayer, TorchModel, TorchTrainer
from mongotorch.errors import (
    DataError,
    JobProcessError,
    MongotorchError,
    ParameterError,
    ServerUnavailableError,
    UnsupportedError,
)
from mongotorch.jobs.launchers.torchrun import TorchrunLauncher
from mongotorch.query import Query
from mongotorch.worker.rank import prediction_main

pytestmark = pytest.mark.fault
ROWS, BATCH = 700, 30
NOBODY = "mongodb://127.0.0.1:1/nobody?directConnection=true&serverSelectionTimeoutMS=2000"


def filled(db: Datalayer, rows: int = ROWS, **given: Any) -> TorchModel:
    """A published model that was not trained for long, and documents, a few of which are for others."""
    draw = torch.Generator().manual_seed(1)
    xs = torch.randn(rows, 24, generator=draw)
    db["rows"].raw.insert_many(
        {"_id": n, "x": x.tolist(), "y": n % 3, "new": n % 7 != 3} for n, x in enumerate(xs)
    )
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 50), nn.Tanh(), nn.BatchNorm1d(50), nn.Linear(50, 3))
    made = TorchTrainer(
        "t",
        key=("x", "y"),
        select=db["rows"].find({"_id": {"$lt": 300}}),
        objective=nn.functional.cross_entropy,
        loader_kwargs={"batch_size": 16},
        max_iterations=3,
        model=TorchModel("m", object=net, **given),
        dtypes={"x": "float32"},
    )
    found: TorchModel = db.apply(made).result()
    return found


def values(db: Datalayer, field: str) -> dict[Any, Any]:
    """The bytes of each prediction."""
    documents = db["rows"].raw.find({field: {"$exists": True}})
    return {one["_id"]: str(one[field]["value"]) for one in documents}


def connected(uri: str, **settings: Any) -> Datalayer:
    return Datalayer.connect(uri, **{**runs.SETTINGS, "compute": "local", **settings})


def new(db: Datalayer) -> Query:
    return db["rows"].find({"new": True})


def test_any_number_of_processes_predicts_the_same_documents_with_the_same_bits(
    server_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, ports = left.marked(monkeypatch), left.ports()
    with connected(server_uri) as db, runs.one_thread():
        filled(db)
        expected = sum(n % 7 != 3 for n in range(ROWS))
        for workers in (1, 2, 3):
            done = db.predict("model", "m", select=new(db), into=f"by{workers}", batch_size=BATCH, workers=workers)
            assert (done.written, done.gone, done.skipped) == (expected, 0, 0)
            kept = db["mt.predictions"].raw.find_one({"into": f"by{workers}"})
            assert kept is not None
            assert (kept["status"], kept["written"], kept.get("calls", {})) == ("succeeded", expected, {})
        assert len(values(db, "by1")) == expected
        assert values(db, "by1") == values(db, "by2") == values(db, "by3")
        left.expect_none(mark, ports)
        again = db.predict("model", "m", select=new(db), into="by2", workers=2)
        assert again.written == 0


def slow(output: Tensor) -> float:
    """A postprocess that makes a call long enough to be killed."""
    time.sleep(0.002)
    return float(output[0])


def when_written(db: Datalayer, do: Any, ended: threading.Event) -> threading.Thread:
    """Do something when some predictions are there."""

    def watch() -> None:
        while not ended.wait(0.02):
            if db["rows"].raw.count_documents({"p": {"$exists": True}}, limit=60) >= 60:
                do()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_killed_process_ends_the_call_and_the_same_call_goes_on(
    server_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, ports = left.marked(monkeypatch), left.ports()

    def kill() -> None:
        own = [pid for pid, command in left.of_mark(mark).items() if "forkserver" in command]
        os.kill(max(own), signal.SIGKILL)

    with connected(server_uri) as db, runs.one_thread():
        filled(db, postprocess=slow)
        ended = threading.Event()
        watching = when_written(db, kill, ended)
        with pytest.raises(JobProcessError, match="was killed by SIGKILL") as raised:
            db.predict("model", "m", select=new(db), into="p", batch_size=BATCH, workers=2)
        ended.set()
        watching.join()
        left.expect_none(mark, ports)
        assert "the same call goes on" in "".join(raised.value.__notes__)
        before = values(db, "p")
        assert 0 < len(before) < 600
        (kept,) = db["mt.predictions"].raw.find()
        assert (kept["status"], kept.get("calls", {})) == ("failed", {})

        done = db.predict("model", "m", select=new(db), into="p", batch_size=BATCH, workers=3)

        assert done.written == 600 - len(before)
        after = values(db, "p")
        assert len(after) == 600
        assert all(after[one] == value for one, value in before.items())


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT interrupt: a process that was started in the background of a script ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_processes_and_is_recorded(server_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mark, ports = left.marked(monkeypatch), left.ports()
    with connected(server_uri) as db, runs.one_thread():
        filled(db, postprocess=slow)
        ended = threading.Event()
        watching = when_written(db, lambda: os.kill(os.getpid(), signal.SIGINT), ended)
        with pytest.raises(KeyboardInterrupt):
            db.predict("model", "m", select=new(db), into="p", batch_size=BATCH, workers=2)
        ended.set()
        watching.join()
        left.expect_none(mark, ports)
        (kept,) = db["mt.predictions"].raw.find()
        assert kept["status"] == "failed"
        assert "KeyboardInterrupt" in kept["error"]


def test_a_document_that_cannot_be_predicted_is_named(server_uri: str) -> None:
    with connected(server_uri) as db:
        filled(db)
        db["rows"].raw.update_one({"_id": 650}, {"$set": {"x": [1.0, 2.0]}})
        with pytest.raises(DataError) as raised:
            db.predict("model", "m", select=new(db), into="p", batch_size=BATCH, workers=2)
        assert raised.value.document_id == 650
        assert any("rank" in note for note in raised.value.__notes__)
        assert db["rows"].raw.count_documents({"p": {"$exists": True}, "_id": {"$gte": 630}}) < 30


def with_another_address(*, settings: dict[str, Any], **given: Any) -> None:
    """A rank, the second of which has an address where nobody is."""
    address = {"uri": NOBODY} if os.environ["RANK"] == "1" else {}
    prediction_main(settings={**settings, **address}, **given)


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("limit", UnsupportedError, "a limit"),
        ("sample", UnsupportedError, "a pipeline"),
        ("none", ParameterError, "workers=0"),
        ("text", ParameterError, "workers='2'"),
        ("room", UnsupportedError, "has room for 2"),
        ("local", UnsupportedError, "has room for 1"),
        ("away", ServerUnavailableError, "127.0.0.1:1"),
    ],
)
def test_what_cannot_be_is_refused_soon_and_writes_nothing(
    server_uri: str, monkeypatch: pytest.MonkeyPatch, kind: str, error: type[MongotorchError], words: str
) -> None:
    settings = {"launcher": "local"} if kind == "local" else {}
    with connected(server_uri, **settings) as db:
        filled(db, 60)
        select, workers = db["rows"].find(), {"none": 0, "text": "2", "room": 4}.get(kind, 2)
        if kind == "limit":
            select = select.limit(5)
        if kind == "sample":
            select = db["rows"].aggregate([{"$sample": {"size": 5}}])
        if kind == "room":
            monkeypatch.setattr(TorchrunLauncher, "free", lambda *_, **__: 2)
        if kind == "away":
            monkeypatch.setattr("mongotorch.services.prediction.RANK_MAIN", f"{__name__}:with_another_address")
        with pytest.raises(error, match=words) as raised:
            db.predict("model", "m", select=select, into="p", workers=workers)  # type: ignore[arg-type]
        assert type(raised.value) is error
        if kind != "away":  # then the other one has predicted its part
            assert db["rows"].count({"p": {"$exists": True}}) == 0
            assert db["mt.predictions"].count() == 0


def test_mongomock_is_refused_for_several_processes() -> None:
    with Datalayer.connect("mongomock://several-predict", progress=False) as db:
        filled(db, 60)
        with pytest.raises(UnsupportedError, match="mongomock") as raised:
            db.predict("model", "m", select=db["rows"].find(), into="p", workers=2)
        assert raised.value.setting == "uri"


def test_documents_left_out_are_counted_over_all_processes(server_uri: str, tmp_path: Path) -> None:
    with connected(server_uri) as db:
        model = filled(db)
        trainer: Any = db.load("trainer", "t")
        db.apply(trainer.replace(on_bad_document="skip", model=model)).result()
        db["rows"].raw.update_many({"_id": {"$in": [3, 660]}}, {"$set": {"x": "none"}})
        done = db.predict("model", "m", select=db["rows"].find(), into="p", batch_size=BATCH, workers=2)
        assert (done.written, done.skipped) == (ROWS - 2, 2)
        assert done.why
