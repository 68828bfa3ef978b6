"""What becomes of a job can be followed in the log: one record an event, with its fields."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from tests.helpers import COLLECTION, fill, points, trainer

from mongotorch import Always, Datalayer, Never, NewDocuments, Schedule, Worker
from mongotorch.cli.logs import FIELDS, JsonFormatter


@pytest.fixture
def queue(uri: str) -> Iterator[Datalayer]:
    given: dict[str, Any] = {"valid_fraction": 0.2, "progress": False, "lineage": False}
    with Datalayer.connect(uri, compute="queue", **given) as datalayer:
        yield datalayer


class Lines:
    """The lines of the JSON log."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.caplog = caplog
        caplog.set_level(logging.INFO, logger="mongotorch")

    def all(self) -> list[dict[str, Any]]:
        return [json.loads(JsonFormatter().format(record)) for record in self.caplog.records]

    def events(self, *fields: str) -> list[tuple[Any, ...]]:
        return [tuple(line.get(name) for name in ("event", *fields)) for line in self.all() if "event" in line]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    return Lines(caplog)


def raising(*_: Any) -> Any:
    raise ValueError("mongodb://u:secret@h is\n no objective")


def test_a_run_is_a_record_an_event_each_with_job_component_and_step(queue: Datalayer, lines: Lines) -> None:
    job = queue.apply(trainer(fill(queue)))
    assert Worker(queue).run(until_idle=True) == 1

    events = [event for event in lines.events("step") if event[0] != "checkpoint"]
    assert events == [
        ("claimed", 0),
        *(("validated", 4), ("validated", 8), ("validated", 12)),
        ("published", queue.show("model", "m", 1)["best_step"]),
        ("succeeded", 12),
    ]
    # One that is due while the one before it is still being written takes its place.
    assert {step for event, step in lines.events("step") if event == "checkpoint"} & {4, 8}
    of_job = [line for line in lines.all() if "event" in line]
    assert {line["job"] for line in of_job} == {job.uuid}
    assert {line["component"] for line in of_job} == {"trainer t"}
    assert {line["attempt"] for line in of_job} == {1}
    validated = next(line for line in of_job if line["event"] == "validated")
    assert validated["values"]["objective"] > 0
    published = next(line for line in of_job if line["event"] == "published")
    assert published["version"] == 1
    assert "version 1 of model 'm'" in published["message"]


def test_a_failure_says_why_at_which_step_and_without_a_password(queue: Datalayer, lines: Lines) -> None:
    queue.apply(trainer(fill(queue), objective=raising))
    Worker(queue).run(until_idle=True)

    failed = next(line for line in lines.all() if line.get("event") == "failed")
    assert failed["level"] == "error"
    assert "ValueError" in failed["why"]
    assert "no objective" in failed["why"]
    assert failed["step"] == 0
    assert "secret" not in json.dumps(lines.all())


def test_a_run_that_is_handed_back_says_after_which_step(queue: Datalayer, lines: Lines) -> None:
    job = queue.apply(trainer(fill(queue)))
    claimed = queue.runner.claim()
    assert claimed is not None
    stop = threading.Event()
    stop.set()
    assert queue.runner.run_claimed(claimed, stop) == "released"

    assert lines.events("step", "job")[-1] == ("handed back", 1, job.uuid)
    assert ("checkpoint", 1, job.uuid) in lines.events("step", "job")
    Worker(queue).run(until_idle=True)
    assert lines.events("step")[-1] == ("succeeded", 12)
    assert ("claimed", 1) in lines.events("step")


def test_a_lost_lease_and_a_cancelled_job_are_said(queue: Datalayer, lines: Lines) -> None:
    job = queue.apply(trainer(fill(queue)))
    claimed = queue.runner.claim()
    assert claimed is not None
    queue.job(job.uuid).cancel()
    assert queue.runner.run_claimed(claimed, threading.Event()) == "cancelled"

    events = lines.events("component")
    assert ("cancelled", "trainer t") in events
    assert {line["level"] for line in lines.all() if line.get("event") == "lease lost"} <= {"warning"}


@pytest.mark.parametrize(("gate", "event"), [(Always(), "promoted"), (Never(), "refused")])
def test_a_schedule_says_that_it_fired_and_whether_its_model_went_live_and_why(
    queue: Datalayer, lines: Lines, gate: Any, event: str
) -> None:
    select = fill(queue)
    queue.apply(Schedule("s", trainer=trainer(select), trigger=NewDocuments(10), gate=gate))
    queue[COLLECTION].raw.insert_many([{**row, "_id": 1000 + row["_id"]} for row in points(10)])
    Worker(queue).run(until_idle=True)

    fired = next(line for line in lines.all() if line.get("event") == "fired")
    job = queue.schedules()[0]["last"]["job"]
    assert (fired["schedule"], fired["job"]) == ("s", job)
    assert "10" in fired["why"]
    verdict = next(line for line in lines.all() if line.get("event") == event)
    assert (verdict["job"], verdict["component"], verdict["version"]) == (job, "schedule s", 1)
    assert verdict["why"] == queue.schedules()[0]["outcome"]["why"]
    assert verdict["why"] in verdict["message"]


def test_the_problem_of_a_schedule_is_said_once(queue: Datalayer, lines: Lines) -> None:
    queue.apply(Schedule("s", trainer=trainer(fill(queue)), trigger=NewDocuments(10)))
    queue["mt.schedules"].raw.update_one({"_id": "s"}, {"$unset": {"state": ""}})
    for _ in range(3):
        queue.scheduler.step()

    problems = [line for line in lines.all() if line.get("event") == "problem"]
    assert [(line["schedule"], line["level"]) for line in problems] == [("s", "warning")]
    assert "state" in problems[0]["why"]


def test_a_line_is_json_whatever_was_measured() -> None:
    record = logging.LogRecord("mongotorch.jobs", logging.INFO, "", 0, "text %s", ("\ud800\n",), None)
    record.__dict__ |= {"values": {"a": float("nan"), "b": float("-inf"), "c": 1.5}, "why": "mongodb://u:pw@h"}

    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert "pw" not in line

    def refuse(name: str) -> None:
        raise AssertionError(name)

    read = json.loads(line, parse_constant=refuse)
    assert read["values"] == {"a": "nan", "b": "-inf", "c": 1.5}
    assert set(read) - {"time", "level", "logger", "message"} <= set(FIELDS)
