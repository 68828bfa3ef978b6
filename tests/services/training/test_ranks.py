"""Runs on several ranks: the same bits as one process, through kills, and what is refused before a rank starts."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests import run_processes as runs

from mongotorch import Datalayer, TorchTrainer
from mongotorch.errors import JobProcessError, ParameterError, UnsupportedError

pytestmark = pytest.mark.fault


def trainer(db: Datalayer, name: str, *, workers: Any, steps: int = 60, **changes: Any) -> TorchTrainer:
    made = runs.trainer(db, name, in_memory=False, steps=steps)
    loader = {"batch_size": 16, "shuffle": True, "drop_last": True}  # a batch norm needs two rows in each lane
    compute = {"workers": workers, "lanes": 4, "device": "cpu"}
    return made.replace(loader_kwargs=loader, compute_kwargs=compute, **changes)


def ranks_of(job_id: str = "") -> list[int]:
    """The processes that run ranks for this one."""
    children = _children()

    def below(pid: int) -> list[int]:
        return [found for child in children.get(pid, []) for found in (child, *below(child))]

    return [pid for driver in drivers() for pid in below(driver)]


def drivers() -> list[int]:
    """The processes that watch ranks for this one."""
    return [pid for pid in _children().get(os.getpid(), []) if b"drive_ranks" in _command(pid)]


def _children() -> dict[int, list[int]]:
    """The children of each process."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, parent = int(path.parent.name), int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(pid)
    return children


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def kill_when(ready: Callable[[], bool], ended: threading.Event) -> threading.Thread:
    """Kill the last rank when something is true."""

    def watch() -> None:
        while not ended.wait(0.02):
            # Not the process that tidies up behind Python's others: a run goes on where that one is gone.
            if ready() and (found := [pid for pid in ranks_of() if b"forkserver" in _command(pid)]):
                os.kill(max(found), signal.SIGKILL)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


class Heard:
    """A callback that writes what it hears of, and where."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_start(self, fit: Any) -> None:
        self.write(fit, "start")

    def on_end(self, fit: Any) -> None:
        self.write(fit, "end")

    def write(self, fit: Any, what: str) -> None:
        with (Path(self.folder) / str(fit.rank)).open("a") as file:
            file.write(f"{what} ")


def test_two_ranks_of_which_one_is_killed_and_that_go_on_give_the_bits_of_one_process(
    server_uri: str, tmp_path: Path
) -> None:
    settings = {**runs.SETTINGS, "compute": "local", "checkpoint_seconds": 0.0}
    with Datalayer.connect(server_uri, **settings) as db, runs.one_thread():
        runs.fill(db, 200)
        alone = runs.weights(db.apply(trainer(db, "alone", workers=1)).result())

        def has_stepped() -> bool:
            return any((job.progress.get("step") or 0) >= 10 for job in db.jobs(status="running"))

        ended = threading.Event()
        watching = kill_when(has_stepped, ended)
        made = trainer(db, "shared", workers=2, callbacks=(Heard(str(tmp_path)),))
        job = db.apply(made)
        ended.set()
        watching.join()
        error = job.exception()
        assert isinstance(error, JobProcessError), error
        assert "was killed by SIGKILL" in str(error)
        assert job.record["error"]["transient"]
        assert ranks_of() == []
        assert db.show("model", "shared") == [0]

        again = db.apply(made)
        assert again.uuid == job.uuid
        assert runs.same(runs.weights(again.result()), alone)
        assert again.record["attempt"] == 2
        assert again.progress["step"] == 60
        assert db.show("model", "shared") == [0, 1]
        assert db.show("model", "shared", 1)["compute"]["workers"] == 2
        assert db["mt.checkpoints"].count() == 0
        kinds = {row.kind for row in again.metrics.rows}
        assert kinds == {"train", "valid"}
        assert [row.step for row in again.metrics.rows if row.kind == "valid"] == [25, 50, 60]
        # Twice begun, and ended once: not again where it is published.
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
            "01", "start start end "
        )


def test_mongomock_is_refused_for_several_workers(tmp_path: Path) -> None:
    with Datalayer.connect("mongomock://several", progress=False) as db:
        runs.fill(db, 40)
        error = db.apply(trainer(db, "several", workers=2)).exception()
        assert isinstance(error, UnsupportedError)
        assert error.setting == "uri"
        assert db.show("model", "several") == [0]


def test_more_workers_than_lanes_are_refused_at_construction(db: Datalayer) -> None:
    with pytest.raises(ParameterError, match="more than lanes=4") as raised:
        trainer(db, "many", workers=8)
    assert raised.value.field == "compute_kwargs"
