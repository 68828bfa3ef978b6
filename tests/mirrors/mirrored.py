"""What tests of mirrors share: a run that is only written down, and mirrors in processes that can be killed."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests import run_processes as runs

from mongotorch import Datalayer
from mongotorch.mirrors import Mirroring, open_mirror
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
    """Be a mirror until killed."""
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    with Datalayer.connect(uri, progress=False) as db, open_mirror(to, db) as target:
        Mirroring(db, target, every_s=0.02).run()


def update(uri: str, to: str) -> int:
    """Mirror what there is by now."""
    with Datalayer.connect(uri, progress=False) as db, open_mirror(to, db) as target:
        return target.update(db)


def torment(uri: str, to: str, db: Datalayer, amount: Callable[[], int], kills: int) -> Written:
    """A run that is measured while its mirror is killed, each time a moment after it began to write.

    Args:
        uri: The database.
        to: The mirror.
        db: The same database.
        amount: How much the target has by now, in any unit.
        kills: How often the mirror is killed; every fourth time wherever it is, mostly before it writes.
    """
    choose = random.Random(4)
    run, step = Written(db), 0
    for number in range(kills):
        process: Any = runs.start(mirror, uri, to)
        before, alive_s = amount(), choose.uniform(0.0, 0.3)
        while process.is_alive() and (alive_s > 0 or (number % 4 and amount() == before)):
            step += 1
            run.measure(step)
            if step % 10 == 0:
                run.measure(step, kind="valid", more={"accuracy": 0.5})
            process.join(pause := choose.uniform(0.0, 0.03))
            alive_s -= pause if number % 4 and amount() == before else pause + 0.01
        assert process.is_alive(), "it was to be killed, and ended by itself"
        process.kill()
        process.join()
    run.fail()
    return run


def half_write(folder: Any) -> None:
    """Leave what a process leaves that is killed while it writes: the newest file, cut in its last record."""
    newest = max(folder.rglob("events.out.tfevents.*"), key=os.path.getmtime)
    newest.write_bytes(newest.read_bytes()[:-7])


def in_tensorboard(folder: Path, run: Any, identifier: str = "t") -> Counter[tuple[str, int]]:
    """How often each tag and step of a run is there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / identifier / run.uuid), size_guidance={"scalars": 0})
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
    found = [one for one in mlflow_runs(store) if one.data.tags["mongotorch.job"] == run.uuid]
    assert len(found) == 1
    run_id = found[0].info.run_id
    histories = {name: client.get_metric_history(run_id, name) for name in found[0].data.metrics}
    return Counter((name, one.step) for name, history in histories.items() for one in history)
