"""What tests of mirrors share: a run that is only written down, and mirrors in processes that can be killed."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests import run_processes as runs
from tests.helpers import fill, trainer

from mongotorch import Datalayer, TorchTrainer, Worker
from mongotorch.cli import app
from mongotorch.mirrors import open_mirror
from mongotorch.store import Jobs, MetricEntry, MetricLog


class Written:
    """A job whose metrics the test writes.

    Args:
        db: Where to.
        identifier: The name of what it trains.
    """

    def __init__(self, db: Datalayer, identifier: str = "t") -> None:
        database = db["x"].raw.database
        self.jobs, self.log = Jobs(database), MetricLog(database)
        self.uuid, _ = self.jobs.add(
            component=f"c-{identifier}",
            type_id="trainer",
            identifier=identifier,
            parameters={"max_iterations": 7, "objective": "torch.x"},
        )
        self.claim()

    def claim(self) -> None:
        """Begin an attempt."""
        claimed = self.jobs.claim(worker="w", lease_s=1000, job_id=self.uuid)
        assert claimed is not None
        self.attempt = claimed["attempt"]

    def measure(self, *steps: int, kind: str = "train", more: Mapping[str, float] | None = None) -> None:
        """Write rows."""
        rows = [
            MetricEntry(
                step=step, kind=kind, values={"objective": 1 / step, "learning_rate": 0.1, **(more or {})}, steps=1
            )
            for step in steps
        ]
        assert self.log.write(rows, job=self.uuid, component="c", attempt=self.attempt)

    def fail(self) -> None:
        """End the job."""
        error = {"type": "RuntimeError", "message": "at mongodb://me:***@host", "traceback": ""}
        assert self.jobs.fail(self.uuid, self.attempt, error=error)

    def expected(self) -> Counter[tuple[str, int]]:
        """Each tag and step, once."""
        return Counter((f"{e['kind']}/{name}", e["step"]) for e in self.log.of(self.uuid) for name in e["values"])


def mirror(uri: str, to: str) -> None:
    """Be the command `mongotorch mirror` until killed."""
    os.environ["MONGOTORCH_URI"] = uri
    app(["mirror", "--to", to, "--every", "0.05", "--log-level", "warning"])


def update(uri: str, to: str) -> int:
    """Mirror what there is by now."""
    with Datalayer.connect(uri, progress=False) as db, open_mirror(to, db) as target:
        return target.update(db)


class Paced:
    """A callback that gives mirrors time; late steps take longer, so that no entry is thinned out."""

    def on_step(self, fit: Any, event: Any) -> None:
        time.sleep(0.02 if event.step < 1000 else 0.5)


def kill_during_a_run(uri: str, db: Datalayer, to: Mapping[str, Callable[[], int]], kills: int) -> str:
    """A run, whose mirrors are killed again and again, each a moment after it began to write; the job.

    Args:
        uri: The database.
        db: The same database, in which workers run jobs.
        to: The mirrors, and how much the target of each has by now, in any unit.
        kills: How often each is killed; every fourth time wherever it is, mostly before it writes.
    """
    job, choose = db.apply(endless(db)), random.Random(4)
    worker = threading.Thread(target=Worker(db).once)
    worker.start()
    try:
        for number in range(kills):
            before = {one: amount() for one, amount in to.items()}
            processes: dict[str, Any] = {one: runs.start(mirror, uri, one) for one in to}
            for one, process in processes.items():
                end_s = time.monotonic() + (120.0 if number % 4 else choose.uniform(0.0, 2.0))
                while process.is_alive() and to[one]() == before[one] and time.monotonic() < end_s:
                    process.join(0.005)
                process.join(choose.uniform(0.0, 0.05))
                assert process.is_alive(), "it was to be killed, and ended by itself"
                process.kill()
                process.join()
                assert not number % 4 or to[one]() > before[one], "it wrote nothing"
    finally:
        job.stop()
        worker.join()
    return str(job.uuid)


def endless(db: Datalayer) -> TorchTrainer:
    """A trainer that measures each step, until it is stopped."""
    given: dict[str, Any] = {"max_iterations": 10**6, "no_improve_then_stop": 10**6, "validation_interval": 10}
    return trainer(fill(db), log_interval=1, callbacks=[Paced()], **given)


def measured(db: Datalayer, job: str) -> Counter[tuple[str, int]]:
    """Each tag and step of a run, once."""
    return Counter((f"{row.kind}/{name}", row.step) for row in db.metrics(job) for name in row.values)


def half_write(folder: Any) -> None:
    """Leave what a process leaves that is killed while it writes: the newest file, cut in its last record."""
    newest = max(folder.rglob("events.out.tfevents.*"), key=os.path.getmtime)
    newest.write_bytes(newest.read_bytes()[:-7])


def in_tensorboard(folder: Path, run: Any, identifier: str = "t") -> Counter[tuple[str, int]]:
    """How often each tag and step of a run is there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / identifier / getattr(run, "uuid", run)), size_guidance={"scalars": 0})
    reader.Reload()
    return Counter((tag, one.step) for tag in reader.Tags()["scalars"] for one in reader.Scalars(tag))


def mlflow_runs(store: str, identifier: str = "t") -> list[Any]:
    """The runs of an experiment of MLflow."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name(identifier)
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id]))


def in_mlflow(store: str, run: Any) -> Counter[tuple[str, int]]:
    """How often each name and step of a run is there."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store)
    found = [one for one in mlflow_runs(store) if one.data.tags["mongotorch.job"] == getattr(run, "uuid", run)]
    assert len(found) == 1
    run_id = found[0].info.run_id
    histories = {name: client.get_metric_history(run_id, name) for name in found[0].data.metrics}
    return Counter((name, one.step) for name, history in histories.items() for one in history)
