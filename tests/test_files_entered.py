"""How many files of the package a call enters: a path that runs through few files can be followed by a reader."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import mongotorch
from mongotorch import Always, Datalayer, NewDocuments, Schedule, Worker
from tests.helpers import COLLECTION, fill, points, trainer

PACKAGE = str(Path(mongotorch.__file__).parent)


class Entered:
    """Collects, in every thread, the package's files of which a function runs; a context manager.

    What runs when a module is imported does not count: it runs once in a process, whoever comes first.
    """

    def __init__(self) -> None:
        self.files: set[str] = set()
        self._importing = threading.local()

    def __enter__(self) -> Entered:
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _profile(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        caller: FrameType | None = frame
        while caller is not None:
            if caller.f_code.co_name == "<module>" and caller.f_code.co_filename.startswith(PACKAGE):
                return
            caller = caller.f_back
        self.files.add(frame.f_code.co_filename.removeprefix(PACKAGE))


def expect(entered: Entered, most: int) -> None:
    assert len(entered.files) <= most, f"{len(entered.files)} files:\n" + "\n".join(sorted(entered.files))


def test_apply_and_result_enter_few_files(db: Datalayer) -> None:
    applied = trainer(fill(db))
    with Entered() as entered:
        db.apply(applied).result()
    expect(entered, 54)


def test_load_enters_few_files(db: Datalayer) -> None:
    db.apply(trainer(fill(db))).result()
    with Entered() as entered:
        db.load("model", "m")
    expect(entered, 12)


def test_from_a_change_to_a_live_version_few_files_are_entered(db: Datalayer) -> None:
    select = fill(db)
    db.apply(Schedule("s", trainer=trainer(select), trigger=NewDocuments(30), gate=Always()))
    others = db[COLLECTION].raw  # the driver's collection, as whoever else writes has it
    with Entered() as entered:
        others.insert_many([{**row, "_id": 1000 + row["_id"]} for row in points(30)])
        Worker(db).run(until_idle=True)
        live = db.load("model", "m")
    assert live.version == 1
    expect(entered, 65)


def test_a_streamed_epoch_with_a_thread_enters_few_files(db: Datalayer) -> None:
    stream: Any = db.stream(fill(db), key=("x", "y"), batch_size=16, shuffle=True, prefetch_size=20)
    with stream, Entered() as entered:
        assert sum(len(batch[1]) for batch in stream) == 120
    expect(entered, 20)
