"""Points: one for a job, step and kind, however often a resumed run says it."""

from __future__ import annotations

from typing import Any

import pytest

from mongotorch.store import MetricLog


@pytest.fixture
def points(database: Any) -> MetricLog:
    points = MetricLog(database)
    points.ensure_indexes()
    return points


def say(points: MetricLog, step: int, kind: str = "valid", job: str = "j", **values: float) -> None:
    points.add(job=job, component="c", step=step, kind=kind, values=values)


def test_the_points_of_a_job_come_by_step(points: MetricLog) -> None:
    say(points, 200, objective=0.5)
    say(points, 100, objective=1.5, accuracy=0.25)
    say(points, 100, kind="train", objective=2.0)
    say(points, 1, job="other", objective=0.0)

    assert [(p["step"], p["kind"], p["values"]) for p in points.of("j")] == [
        (100, "train", {"objective": 2.0}),
        (100, "valid", {"objective": 1.5, "accuracy": 0.25}),
        (200, "valid", {"objective": 0.5}),
    ]
    assert points.of("j")[0]["component"] == "c"


def test_what_a_resumed_run_says_again_takes_the_place_of_what_it_said(points: MetricLog) -> None:
    say(points, 100, objective=1.0)
    say(points, 100, accuracy=0.5)

    assert [p["values"] for p in points.of("j")] == [{"accuracy": 0.5}]


def test_the_points_of_one_job_can_be_removed(points: MetricLog) -> None:
    say(points, 1, objective=1.0)
    say(points, 1, job="other", objective=1.0)

    assert points.remove("j") == 1
    assert points.of("j") == []
    assert len(points.of("other")) == 1


def test_names_that_a_field_cannot_have_are_kept_readable(points: MetricLog) -> None:
    points.add(job="j", component="c", step=1, kind="valid", values={"top.5": 1, "$x": float("nan")})

    values = points.of("j")[0]["values"]
    assert values["top_5"] == 1.0
    assert values["_x"] != values["_x"]
