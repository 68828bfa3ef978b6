"""The gate of a run on several ranks: they score together, and it judges as after a run in one process."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import processes_left as left
from tests import run_processes as runs
from tests.services.training.test_ranks import trainer

from mongotorch import Better, Datalayer, Every, Metric, Schedule, TorchModel, Validation, Worker

pytestmark = pytest.mark.fault
HERE = "here"  # the process that has claimed the job
_HOLD = "hold"
_DEADLINE_S = 120.0


class Seen:
    """A metric that writes which rank measures, and waits or fails where it is asked to."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> float:
        folder, rank = Path(self.folder), os.environ.get("RANK", HERE)
        with (folder / rank).open("a") as file:
            file.write(f"{os.getpid()}\n")
        if rank in ("1", HERE) and (folder / "raise").exists():
            raise LookupError("no such sample")
        deadline = time.monotonic() + _DEADLINE_S
        while rank == "1" and (folder / _HOLD).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        return float((output.argmax(dim=1) == target).float().mean())


@pytest.fixture
def db(server_uri: str) -> Iterator[Datalayer]:
    settings = {**runs.SETTINGS, "lease_s": 30.0, "checkpoint_seconds": 3600, "valid_fraction": 0.3}
    with runs.one_thread(), Datalayer.connect(server_uri, **settings) as made:
        runs.fill(made, 400)
        yield made


def judged(db: Datalayer, name: str, folder: Path, *, workers: int) -> Any:
    """The version that a firing publishes, trained by so many ranks, after one that is live."""
    folder.mkdir(exist_ok=True)
    validation = Validation("v", metrics=[Metric("hits", object=Seen(folder))])
    with torch.random.fork_rng():
        made = trainer(db, name, workers=1, steps=4, validation_interval=None)
        model: Any = made.model
        first = made.replace(model=TorchModel(name, object=model.object, validation=validation))
        applied = db.apply(first)
        Worker(db).run(until_idle=True)
        db.promote("model", name, applied.result().version)
        compute = {"workers": workers, "lanes": 4, "device": "cpu"}
        again = first.replace(compute_kwargs=compute, max_iterations=30)
        db.apply(Schedule(name, trainer=again, trigger=Every(seconds=1e6), gate=Better()))
    job = db.fire(name)
    Worker(db).run(until_idle=True)
    return db.show(uuid=job.result(timeout=10).uuid)


def verdict(document: Any) -> dict[str, Any]:
    """Without the uuid of the version that it compared with."""
    return {**document["verdict"], "against": document["verdict"]["against"]["version"]}


def seen(folder: Path) -> set[str]:
    """Who has measured."""
    return {path.name for path in folder.iterdir()} & {HERE, *"0123"}


@contextlib.contextmanager
def when_scored(folder: Path, do: Callable[[int], object]) -> Iterator[None]:
    """Do something with the process of rank 1 when it scores; it waits until that is done."""
    folder.mkdir()
    (folder / _HOLD).touch()

    def watch() -> None:
        try:
            left.wait_for(lambda: (folder / "1").exists() and (folder / "1").read_text().endswith("\n"))
            do(int((folder / "1").read_text().split()[0]))
        finally:
            (folder / _HOLD).unlink()

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    thread.join()


def test_the_verdict_has_the_bits_of_one_process_also_where_a_rank_is_killed_while_it_scores(
    db: Datalayer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = judged(db, "alone", tmp_path / "alone", workers=1)
    assert seen(tmp_path / "alone") == {HERE}
    assert verdict(alone)["documents"] > 64, "several batches"
    shared = judged(db, "shared", tmp_path / "shared", workers=2)
    assert verdict(shared) == verdict(alone)
    assert seen(tmp_path / "shared") == {"0", "1"}
    assert (alone["compute"]["workers"], shared["compute"]["workers"]) == (1, 2)
    assert db["mt.checkpoints"].count() == 0

    # And where the next attempt has to judge what was trained.
    mark, ports = left.marked(monkeypatch), left.ports()
    folder = tmp_path / "killed"
    with when_scored(folder, lambda pid: os.kill(pid, signal.SIGKILL)):
        found = judged(db, "killed", folder, workers=2)
    (job,) = db.jobs(identifier="killed")
    assert job.record["attempt"] == 2
    assert verdict(found) == verdict(alone)
    assert HERE in seen(folder), "ranks have left no scores"
    assert found["steps"] == 30
    assert db.show("model", "killed") == [0, 1, 2]
    left.expect_none(mark, ports)


def test_scores_against_another_version_than_the_live_one_are_measured_again(
    db: Datalayer, tmp_path: Path
) -> None:
    folder = tmp_path / "moved"
    with when_scored(folder, lambda _: db.promote("model", "moved", 0)):
        found = judged(db, "moved", folder, workers=2)
    assert verdict(found)["against"] == 0
    assert {"0", "1", HERE} <= seen(folder)


def test_what_a_rank_raises_while_it_scores_is_in_the_verdict_and_does_not_fail_the_run(
    db: Datalayer, tmp_path: Path
) -> None:
    folder = tmp_path / "raising"
    folder.mkdir()
    (folder / "raise").touch()
    found = judged(db, "raising", folder, workers=2)
    assert verdict(found)["why"] == "the gate raised LookupError: no such sample"
    assert not verdict(found)["promote"]
    (job,) = db.jobs(identifier="raising")
    assert (job.status, job.record["attempt"]) == ("succeeded", 1)
    assert seen(folder) == {"0", "1", HERE}
