"""What the tests of the dashboard share: a client of the application, and databases with something to show."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from starlette.testclient import TestClient
from tests.helpers import COLLECTION, fill, trainer

from mongotorch import Datalayer, NewDocuments, Schedule, TorchModel
from mongotorch.web import create_app

BEGUN = datetime(2026, 5, 3, 12, tzinfo=UTC).replace(tzinfo=None)


@contextlib.contextmanager
def client(db: Datalayer, *, token: str | None = None, at: str = "http://127.0.0.1") -> Iterator[TestClient]:
    """A client of the dashboard of a database."""
    with TestClient(create_app(db, token=token), base_url=at, follow_redirects=False) as opened:
        yield opened


def fill_with_runs(db: Datalayer) -> tuple[str, TorchModel]:
    """Train and promote a model, train it on, and apply a schedule; the first job's id and its model."""
    job = db.apply(trainer(fill(db)))
    model = job.result()
    db.promote("model", "m", why="the first")
    db.apply(Schedule("nightly", trainer=trainer(db[COLLECTION].find()), trigger=NewDocuments(30)))
    return job.uuid, model


def pages_of(db: Datalayer, job: str, model: TorchModel) -> list[str]:
    """The address of each kind of page."""
    given = db.show("model", "m", 0)["_id"]
    return [
        *("/", "/?status=succeeded&identifier=t", f"/runs/{job}", "/compare", f"/compare?run={job}&run={job}"),
        *("/models", "/models/m", f"/diff?old={given}&new={model.uuid}", f"/lineage/{model.uuid}"),
        *("/schedules", "/data", f"/data/{COLLECTION}", "/storage", "/storage?gc=1"),
    ]


def as_json(address: str) -> str:
    """The address of the values of a page."""
    return address + ("&" if "?" in address else "?") + "format=json"


def insert_runs(db: Datalayer, count: int, *, entries: int = 0) -> list[str]:
    """Insert the records of so many runs, each with so many measurements; their ids."""
    database = db[COLLECTION].raw.database
    jobs = [
        {
            "_id": f"job-{n:05}",
            "format": 1,
            "component": f"component-{n}",
            "type_id": "trainer",
            "identifier": f"trainer-{n % 7}",
            "method": "fit",
            "status": "succeeded" if n % 5 else "failed",
            "priority": 0,
            "attempt": 1,
            "created": BEGUN + timedelta(seconds=n),
            "started": BEGUN + timedelta(seconds=n),
            "finished": BEGUN + timedelta(seconds=n + 60),
            "worker": "a-worker",
            "progress": {"step": 100, "max_steps": 100, "samples_per_s": 12.5, "values": {"objective": 0.1}},
            "error": None if n % 5 else {"type": "ValueError", "message": "no", "traceback": "line\n" * 50},
            "parameters": {"batch_size": 16},
            "environment": {"python": "3.11"},
        }
        for n in range(count)
    ]
    database["mt.jobs"].insert_many(jobs)
    names = [str(job["_id"]) for job in jobs]
    for first in range(0, count if entries else 0, 50):
        database["mt.metrics"].insert_many(
            [_entry(job, step) for job in names[first : first + 50] for step in range(entries)]
        )
    return names


def _entry(job: str, step: int) -> dict[str, Any]:
    values = {"objective": 1 / (step + 1), "learning_rate": 0.01}
    at = BEGUN + timedelta(seconds=step)
    return {
        "_id": f"{job}:{step}:train",
        "format": 1,
        "job": job,
        "step": step,
        "kind": "train",
        "values": values,
        "at": at,
    }
