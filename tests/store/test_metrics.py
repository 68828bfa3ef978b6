"""Points: one for a job, step and kind, however often a resumed run says it."""

from __future__ import annotations

from typing import Any

import pytest

from mongotorch.store import MetricEntry, MetricLog


@pytest.fixture
def log(database: Any) -> MetricLog:
    log = MetricLog(database)
    log.ensure_indexes()
    return log


def write(log: MetricLog, step: int, kind: str = "valid", job: str = "j", **values: float) -> None:
    log.add(job=job, component="c", step=step, kind=kind, values=values)


def test_the_entries_of_a_job_come_by_step(log: MetricLog) -> None:
    write(log, 200, objective=0.5)
    write(log, 100, objective=1.5, accuracy=0.25)
    write(log, 100, kind="train", objective=2.0)
    write(log, 1, job="other", objective=0.0)

    assert [(p["step"], p["kind"], p["values"]) for p in log.of("j")] == [
        (100, "train", {"objective": 2.0}),
        (100, "valid", {"objective": 1.5, "accuracy": 0.25}),
        (200, "valid", {"objective": 0.5}),
    ]
    assert log.of("j")[0]["component"] == "c"


def test_an_entry_that_a_resumed_run_writes_again_replaces_the_first(log: MetricLog) -> None:
    write(log, 100, objective=1.0)
    write(log, 100, accuracy=0.5)

    assert [p["values"] for p in log.of("j")] == [{"accuracy": 0.5}]


def test_the_entries_of_one_job_can_be_removed(log: MetricLog) -> None:
    write(log, 1, objective=1.0)
    write(log, 1, job="other", objective=1.0)

    assert log.remove("j") == 1
    assert log.of("j") == []
    assert len(log.of("other")) == 1


def test_names_that_a_field_cannot_have_are_kept_readable(log: MetricLog) -> None:
    log.add(job="j", component="c", step=1, kind="valid", values={"top.5": 1, "$x": float("nan")})

    values = log.of("j")[0]["values"]
    assert values["top_5"] == 1.0
    assert values["_x"] != values["_x"]


def test_train_entries_are_thinned_and_validations_are_not(log: MetricLog) -> None:
    entries = [
        MetricEntry(step=step, kind="train", values={"objective": 1.0}, steps=50) for step in (50, 100, 150)
    ]
    assert log.write(entries, job="j", component="c")
    write(log, 50)
    write(log, 50, kind="train", job="other")

    assert log.thin("j", 100) == 2
    assert [(entry["step"], entry["kind"]) for entry in log.of("j")] == [(50, "valid"), (100, "train")]
    assert log.of("j")[1]["steps"] == 50
    assert len(log.of("other")) == 1


def test_the_entries_after_a_step_can_be_removed(log: MetricLog) -> None:
    for step in (1, 2, 3):
        write(log, step)
    assert log.remove("j", after=2) == 1
    assert log.remove("j", after=0) == 2


def test_nothing_is_written_in_one_request(log: MetricLog) -> None:
    assert log.write([], job="j", component="c")
    assert log.of("j") == []
