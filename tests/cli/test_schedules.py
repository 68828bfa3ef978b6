"""`mongotorch schedule …`: what people do with schedules from a shell, as tables and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import ObjectId, json_util
from tests.cli.printed import columns_of
from tests.helpers import COLLECTION, fill, points, trainer
from typer.testing import CliRunner

from mongotorch import (
    AllOf,
    Always,
    AnyOf,
    Changed,
    Cron,
    Datalayer,
    Every,
    MetricAbove,
    Never,
    NewDocuments,
    Schedule,
    Worker,
)
from mongotorch.cli import app
from mongotorch.schedule import Decision, State, Trigger

Call = Callable[..., Any]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, uri: str) -> Call:
    """Run the command on the test's database, in a terminal that breaks no line."""
    monkeypatch.setenv("MONGOTORCH_URI", uri)
    monkeypatch.setenv("MONGOTORCH_PROGRESS", "false")
    monkeypatch.setenv("COLUMNS", "1000")
    return lambda *arguments: CliRunner().invoke(app, ["schedule", *arguments])


def schedule(db: Datalayer, trigger: Any, identifier: str = "s", **given: Any) -> Schedule:
    """A schedule of one step over the usual documents."""
    short = trainer(db[COLLECTION].find(), max_iterations=1, validation_interval=None)
    return Schedule(identifier, trainer=short, trigger=trigger, **given)


def insert(db: Datalayer, count: int) -> None:
    """Insert documents as another client would."""
    db[COLLECTION].raw.insert_many({**row, "_id": ObjectId()} for row in points(count))


def test_list_says_what_each_schedule_counts_and_what_came_of_it(call: Call, db: Datalayer) -> None:
    fill(db)
    db.apply(schedule(db, NewDocuments(10), "busy", gate=Always()))
    db.apply(schedule(db, NewDocuments(10), "shadow", gate=Never(), paused=True))
    insert(db, 10)
    Worker(db).run(until_idle=True)
    insert(db, 3)
    db.scheduler.step()

    done = call("list")

    assert done.exit_code == 0, done.output
    cells = columns_of(done.stdout)
    assert cells["schedule"] == ["busy", "shadow"]
    assert cells["state"] == ["on", "paused"]
    assert cells["trigger"] == ["NewDocuments(n=10)"] * 2
    assert cells["counted"] == ["3 new", "13 new"]
    assert cells["firings"] == ["1", "0"]
    last, never = cells["last"]
    at, _, reason = last.partition(": ")
    assert reason == "10 new documents, at least 10"
    assert abs(datetime.fromisoformat(at) - datetime.now(UTC)) < timedelta(minutes=5)
    assert cells["outcome"] == ["m version 1 promoted: every trained model goes live", ""]
    assert (never, cells["problem"]) == ("", ["", ""])


def test_list_as_json_is_the_runtime_documents(call: Call, db: Datalayer) -> None:
    fill(db)
    assert json.loads(call("list", "--json").stdout) == []
    db.apply(schedule(db, Every(seconds=3600)))

    (document,) = json_util.loads(call("list", "--json").stdout)

    assert document["_id"] == "s"
    (kept,) = db.schedules()
    assert document["next_at"].replace(tzinfo=None) == kept["next_at"]
    assert {**document, "state": None, "next_at": None} == {**kept, "state": None, "next_at": None}


def test_list_shows_why_a_version_is_not_live_and_what_is_wrong(call: Call, db: Datalayer) -> None:
    fill(db)
    db.apply(schedule(db, NewDocuments(10), gate=Never()))
    db.fire("s", why="to see it")
    Worker(db).run(until_idle=True)
    db["mt.schedules"].raw.update_one({"_id": "s"}, {"$set": {"problem": "[red]nothing[/] works"}})

    cells = columns_of(call("list").stdout)

    assert cells["outcome"] == ["m version 1 not promoted: no trained model goes live by itself; promote it"]
    assert cells["last"][0].endswith(": to see it")
    assert cells["problem"] == ["[red]nothing[/] works"]


@dataclasses.dataclass(frozen=True)
class Odd(Trigger):
    """A trigger of a user's own, with a field that is no plain value."""

    judge: Any

    def due(self, now: datetime, state: State) -> tuple[Decision, State]:
        return Decision(False, "never"), state


@pytest.mark.parametrize(
    ("trigger", "given", "said"),
    [
        (Every(seconds=60), {}, "Every(seconds=60, catch_up=True)"),
        (NewDocuments(5, max_wait=60.0), {}, "NewDocuments(n=5, max_wait=60.0)"),
        (Changed(5), {"max_wait": 90.0}, "Changed(n=5), or 90 s after the first"),
        (
            AnyOf(Cron("0 3 * * *", tz="Europe/Berlin"), AllOf(NewDocuments(5), Changed(7))),
            {},
            "AnyOf(Cron(expression='0 3 * * *', tz='Europe/Berlin', catch_up=True), "
            "AllOf(NewDocuments(n=5), Changed(n=7)))",
        ),
        (
            MetricAbove("objective", 2.5, every_s=60.0, documents=10),
            {},
            "MetricAbove(metric='objective', threshold=2.5, every_s=60.0, documents=10)",
        ),
        (Odd(judge=len), {}, "Odd(judge=<name>)"),
    ],
)
def test_a_trigger_is_shown_as_one_writes_it(
    call: Call, db: Datalayer, trigger: Trigger, given: dict[str, Any], said: str
) -> None:
    fill(db)
    db.apply(schedule(db, trigger, **given))

    assert columns_of(call("list").stdout)["trigger"] == [said]


def test_what_was_measured_is_shown_beside_what_was_counted(call: Call, db: Datalayer) -> None:
    fill(db)
    db.apply(schedule(db, AnyOf(Changed(100), MetricAbove("objective", 1e6, every_s=60.0, documents=10))))
    db["mt.schedules"].raw.update_one(
        {"_id": "s"}, {"$set": {"state.changed": 1234, "state.scores": {"objective": 0.25}}}
    )

    assert columns_of(call("list").stdout)["counted"] == ["1,234 changed, objective 0.25"]


def test_a_schedule_is_paused_and_goes_on(call: Call, db: Datalayer) -> None:
    fill(db)
    db.apply(schedule(db, Every(seconds=3600)))

    paused = call("pause", "s")
    (document,) = db.schedules()
    assert document["paused"]
    assert columns_of(call("list").stdout)["next"] == [""]
    resumed = call("resume", "s")
    (document,) = db.schedules()
    assert not document["paused"]
    assert datetime.fromisoformat(columns_of(call("list").stdout)["next"][0]).tzinfo == UTC

    assert (paused.stdout, resumed.stdout) == ("schedule s is paused\n", "schedule s goes on\n")
    told = [json.loads(call(verb, "s", "--json").stdout) for verb in ("pause", "resume")]
    assert told == [{"schedule": "s", "paused": True}, {"schedule": "s", "paused": False}]


def test_run_fires_by_hand_and_prints_the_job(call: Call, db: Datalayer) -> None:
    fill(db)
    db.apply(schedule(db, NewDocuments(10**6), gate=Always(), paused=True))

    first = call("run", "s", "--why", "the data was cleaned")
    second = json.loads(call("run", "s", "--json").stdout)

    assert first.exit_code == 0, first.output
    job = db.job(first.stdout.strip())
    assert job.record["parameters"]["reason"] == "the data was cleaned"
    assert second == {"schedule": "s", "job": second["job"], "why": "by hand"}
    assert second["job"] != job.uuid
    Worker(db).run(until_idle=True)
    assert {job.result(timeout=5).version, db.job(second["job"]).result(timeout=5).version} == {1, 2}


def test_preview_says_when_it_would_have_fired(call: Call, db: Datalayer) -> None:
    fill(db)
    db.apply(schedule(db, AnyOf(Cron("0 3 * * *"), NewDocuments(2))))
    morning = datetime(2026, 5, 3, 12, tzinfo=UTC)
    db[COLLECTION].raw.insert_many({"_id": ObjectId.from_datetime(morning), "x": [0.0] * 4, "y": 0} for _ in "1")
    later = ObjectId.from_datetime(morning + timedelta(hours=1))
    db[COLLECTION].raw.insert_one({"_id": later, "x": [0.0] * 4, "y": 0})

    said = call("preview", "s", "--since", "2026-05-03T06:00", "--until", "2026-05-04T05:00+02:00")

    assert said.exit_code == 0, said.output
    cells = columns_of(said.stdout)
    assert cells["at"] == ["2026-05-03T13:00:00Z", "2026-05-04T03:00:00Z"]
    assert cells["reason"][0] == "2 new documents, at least 2"
    firings = json_util.loads(
        call("preview", "s", "--since", "2026-05-03", "--until", "2026-05-03T12:59", "--json").stdout
    )
    assert [firing["at"] for firing in firings] == [datetime(2026, 5, 3, 3)]


def test_preview_up_to_now_ends_now(call: Call, db: Datalayer) -> None:
    fill(db)
    db.apply(schedule(db, Every(seconds=60)))
    since = datetime.now(UTC) - timedelta(seconds=150)

    firings = json.loads(call("preview", "s", "--since", since.isoformat(), "--json").stdout)

    assert len(firings) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("pause", "nobody"), "NotFoundError"),
        (("resume", "nobody"), "NotFoundError"),
        (("run", "nobody"), "NotFoundError"),
        (("preview", "nobody", "--since", "2026-05-03"), "NotFoundError"),
        (("preview", "measured", "--since", "2026-05-03"), "ParameterError"),
        (("preview", "measured", "--since", "2026-05-03", "--until", "2026-05-02"), "ParameterError"),
        (("list", "--uri", "ftp://me:hunter2@host/x"), "SettingError"),
    ],
)
def test_an_error_is_one_line(call: Call, db: Datalayer, arguments: tuple[str, ...], said: str) -> None:
    fill(db)
    db.apply(schedule(db, MetricAbove("objective", 1.0, every_s=60.0, documents=10), "measured"))

    done = call(*arguments)

    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{said}: ")
    assert "hunter2" not in done.output


def test_a_time_that_is_none_is_refused_with_an_example(call: Call) -> None:
    done = call("preview", "s", "--since", "yesterday")

    assert done.exit_code == 2
    assert "'yesterday' is no time such as 2026-05-03T12:00" in done.stderr


def test_the_help_of_the_worker_says_that_it_runs_schedules() -> None:
    done = CliRunner().invoke(app, ["worker", "--help"])

    assert "schedules" in done.stdout
