"""The commands `metrics`, `stop` and `mirror`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import fill, trainer
from typer.testing import CliRunner

from mongotorch import Datalayer, Job
from mongotorch.cli import app

Call = Callable[..., Any]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, uri: str) -> Call:
    """Run the command on the test's database."""
    monkeypatch.setenv("MONGOTORCH_URI", uri)
    monkeypatch.setenv("MONGOTORCH_PROGRESS", "false")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LINES", "30")
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


@pytest.fixture
def job(db: Datalayer) -> Job[Any]:
    """A run of 12 steps that validated three times."""
    return db.apply(trainer(fill(db), log_interval=1))


@pytest.fixture
def queued(uri: str, db: Datalayer) -> Iterator[Job[Any]]:
    """A job that waits for a worker."""
    with Datalayer.connect(uri, compute="queue", progress=False) as other:
        yield other.apply(trainer(fill(db)))


def test_metrics_are_a_table(call: Call, job: Job[Any]) -> None:
    done = call("metrics", job.uuid)
    assert done.exit_code == 0, done.output
    assert len([line for line in done.stdout.splitlines() if "train" in line]) == 12
    assert len([line for line in done.stdout.splitlines() if "valid" in line]) == 3
    assert call("metrics", job.result().uuid).stdout == done.stdout


def test_a_job_is_named_by_its_first_characters(call: Call, job: Job[Any]) -> None:
    assert call("metrics", job.uuid[:6]).stdout == call("metrics", job.uuid).stdout


def test_metrics_are_json(call: Call, job: Job[Any]) -> None:
    found = json.loads(call("metrics", job.uuid, "--json").stdout)
    assert [(row["step"], row["kind"]) for row in found] == [(row.step, row.kind) for row in job.metrics]
    assert found[0]["values"]["objective"] == pytest.approx(job.metrics.rows[0].values["objective"])


def test_metrics_are_a_curve(call: Call, job: Job[Any]) -> None:
    done = call("metrics", job.uuid, "--plot")
    assert done.exit_code == 0, done.output
    title, *lines = done.stdout.splitlines()
    assert title.startswith(f"objective of job {job.uuid}")
    values = [value for kind in ("train", "valid") for value in job.metrics.curve("objective", kind)[1]]
    assert f"{max(values):.4g}" in lines[0]
    assert f"{min(values):.4g}" in lines[-3]
    assert lines[-1].split() == ["1", "12"]
    drawn = "".join(lines[:-2])
    assert drawn.count("o") == 3
    dots = sum((ord(sign) - 0x2800).bit_count() for sign in drawn if 0x2800 < ord(sign) < 0x2900)
    assert 9 <= dots <= 12
    assert max(map(len, lines)) <= 120


def test_a_curve_of_nothing_says_what_there_is(call: Call, job: Job[Any]) -> None:
    assert "there are objective" in call("metrics", job.uuid, "--plot", "--value", "nothing").stdout


def test_a_curve_of_one_value_is_drawn(call: Call, db: Datalayer) -> None:
    short = db.apply(trainer(fill(db), max_iterations=1, validation_interval=None))
    done = call("metrics", short.uuid, "--plot", "--value", "learning_rate")
    assert done.exit_code == 0, done.output
    assert "0.01" in done.stdout


def test_metrics_are_followed_line_by_line(call: Call, job: Job[Any]) -> None:
    done = call("metrics", job.uuid, "--follow", "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["step"] for row in rows] == [row.step for row in job.metrics]
    text = call("metrics", job.uuid, "--follow").stdout
    assert len(text.splitlines()) == 15
    assert "step 12" in text


def test_metrics_of_a_job_that_has_none_are_empty(call: Call, queued: Job[Any]) -> None:
    assert call("metrics", queued.uuid, "--json").stdout.strip() == "[]"
    assert call("metrics", queued.uuid, "--plot").exit_code == 0
    assert call("metrics", queued.uuid).exit_code == 0


@pytest.mark.parametrize("command", [("metrics", "nobody"), ("stop", "nobody"), ("mirror", "--to", "nothing:x")])
def test_what_is_not_there_is_one_line(call: Call, db: Datalayer, command: tuple[str, ...]) -> None:
    done = call(*command)
    assert done.exit_code == 1
    assert len(done.stderr.splitlines()) == 1


def test_a_job_that_has_ended_is_not_stopped(call: Call, job: Job[Any]) -> None:
    done = call("stop", job.uuid)
    assert (done.exit_code, "it succeeded" in done.stdout) == (1, True)
    assert json.loads(call("stop", job.uuid, "--json").stdout)["stopped"] is False


def test_a_job_that_has_not_begun_is_cancelled(call: Call, queued: Job[Any]) -> None:
    done = call("stop", queued.uuid)
    assert done.exit_code == 0, done.output
    assert "it had not begun" in done.stdout
    assert queued.status == "cancelled"


def test_a_mirror_passes_on_what_there_is_once(call: Call, job: Job[Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert "15 row(s)" in call("mirror", "--to", f"tensorboard:{tmp_path}", "--once").stdout
    assert "0 row(s)" in call("mirror", "--to", f"tensorboard:{tmp_path}", "--once").stdout
    assert list((tmp_path / "t" / job.uuid).glob("events.*"))
