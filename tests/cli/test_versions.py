"""`mongotorch promote|rollback|history|diff|lineage`: which version counts, and where it comes from."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import json_util
from tests.cli.printed import lines_of, pairs_of
from tests.helpers import COLLECTION, fill, model, trainer
from typer.testing import CliRunner

from mongotorch import Always, Datalayer, Every, Query, Schedule, TorchModel, Worker
from mongotorch.cli import app

Call = Callable[..., Any]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, uri: str) -> Call:
    """Run the command on the test's database, in a terminal that breaks no line."""
    monkeypatch.setenv("MONGOTORCH_URI", uri)
    monkeypatch.setenv("MONGOTORCH_PROGRESS", "false")
    monkeypatch.setenv("COLUMNS", "1000")
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def three(db: Datalayer) -> list[TorchModel]:
    """Three versions of one model, nothing trained."""
    return [db.apply(model(seed=seed)).result() for seed in range(3)]


def retrained(db: Datalayer, times: int = 1) -> list[TorchModel]:
    """What a schedule's runs published, each from the one before."""
    chosen = trainer(fill(db), max_iterations=2, validation_interval=1)
    db.apply(Schedule("s", trainer=chosen, trigger=Every(seconds=1e6), gate=Always()))
    runs = []
    for n in range(times):
        runs.append(db.fire("s", why=f"the {n}th time"))
        Worker(db).run(until_idle=True)
    return [run.result(timeout=5) for run in runs]


def test_promote_moves_the_alias_and_says_from_where(call: Call, db: Datalayer) -> None:
    models = three(db)

    first = call("promote", "model", "m", "0", "--why", "reviewed")
    second = json_util.loads(call("promote", "model", "m", "--json").stdout)

    assert first.exit_code == 0, first.output
    one, two = db.history("model", "m")
    when = one.when.isoformat(timespec="milliseconds") + "Z"
    assert first.stdout == f"live of model m is version 0 since {when} (move 1, by {one.who}; before: nothing)\n"
    assert (one.why, one.to_uuid) == ("reviewed", models[0].uuid)
    assert (second["from_version"], second["to_version"], second["to"]) == (0, 2, models[2].uuid)
    assert second["when"].replace(tzinfo=None) == two.when
    assert db.load("model", "m").uuid == models[2].uuid


def test_promote_by_uuid_and_to_another_alias(call: Call, db: Datalayer) -> None:
    models = three(db)

    assert call("promote", "model", "m", "--uuid", models[1].uuid, "--alias", "stage").exit_code == 0

    assert db.load("model", "m", alias="stage").uuid == models[1].uuid
    assert db.history("model", "m") == []


def test_what_is_named_already_is_told_since_when(call: Call, db: Datalayer) -> None:
    three(db)

    first, again = call("promote", "model", "m", "1"), call("promote", "model", "m", "1", "--why", "again")

    assert first.stdout == again.stdout
    assert len(db.history("model", "m")) == 1


def test_a_rollback_and_a_rollback_of_it(call: Call, db: Datalayer) -> None:
    three(db)
    db.promote("model", "m", 0)
    db.promote("model", "m", 2)

    back = call("rollback", "model", "m", "--why", "complaints")
    forth = json.loads(call("rollback", "model", "m", "--json").stdout)

    assert back.exit_code == 0, back.output
    assert back.stdout.startswith("live of model m is version 0 since ")
    assert "before: 2" in back.stdout
    assert (forth["n"], forth["from_version"], forth["to_version"]) == (4, 0, 2)
    assert [move.why for move in db.history("model", "m")] == ["", "", "complaints", ""]


def test_history_is_every_move_and_what_was_live_at_a_time(call: Call, db: Datalayer) -> None:
    three(db)
    db.promote("model", "m", 0, who="ann", why="[bold]first[/]")
    db.promote("model", "m", 2, who="bob")
    db.remove("model", "m", 2, force=True)
    one, two, three_ = db.history("model", "m")

    said = call("history", "model", "m")
    moves = json_util.loads(call("history", "model", "m", "--json").stdout)

    heading, *rows = lines_of(said.stdout)
    assert heading == ["n", "when", "from", "to", "who", "why"]
    shown = [[n, *rest] for n, _, *rest in rows]
    assert shown[:2] == [["1", "nothing", "0", "ann", "[bold]first[/]"], ["2", "0", "2", "bob", ""]]
    assert shown[2] == ["3", "2", "nothing", three_.who, "removed"]
    assert [datetime.fromisoformat(row[1]).replace(tzinfo=None) for row in rows] == [
        move.when for move in (one, two, three_)
    ]
    assert [(move["n"], move["from"], move["to"]) for move in moves] == [
        (move.n, move.from_uuid, move.to_uuid) for move in (one, two, three_)
    ]
    before = one.when - timedelta(milliseconds=1)
    assert json.loads(call("history", "model", "m", "--at", before.isoformat(), "--json").stdout) == []
    elsewhere = (one.when.replace(tzinfo=UTC) + timedelta(days=1)).isoformat()
    assert len(json.loads(call("history", "model", "m", "--at", elsewhere, "--json").stdout)) == 3
    assert json.loads(call("history", "model", "m", "--alias", "stage", "--json").stdout) == []


def test_diff_says_how_two_versions_differ(call: Call, db: Datalayer) -> None:
    first = db.apply(trainer(fill(db), max_iterations=2, validation_interval=1)).result()
    db[COLLECTION].raw.insert_one({"_id": 9999, "x": [0.0] * 4, "y": 0, "_fold": "train"})
    chosen = trainer(db[COLLECTION].find(), max_iterations=3, validation_interval=1)
    second = db.apply(chosen).result()

    said = call("diff", first.uuid, second.uuid)
    told = json.loads(call("diff", first.uuid, second.uuid, "--json").stdout)

    assert said.exit_code == 0, said.output
    assert said.stdout.rstrip("\n") == str(db.diff(first.uuid, second.uuid))
    assert "1 added, 0 removed, 0 changed" in said.stdout
    assert told["data"] == {"added": 1, "removed": 0, "changed": 0}
    assert told["parameters"]["trainer.max_iterations"] == {"old": 2, "new": 3}


def test_lineage_says_what_a_version_was_made_of(call: Call, db: Datalayer) -> None:
    (trained,) = retrained(db)
    document = db.show("model", "m", 1)

    said = call("lineage", "model", "m", "1")

    assert said.exit_code == 0, said.output
    title = said.stdout.splitlines()[0]
    assert title.strip() == f"model m version 1 {trained.uuid}"
    rows = pairs_of(said.stdout)
    data = document["data"]
    assert rows["live"] == "yes"
    assert rows["parent"] == f"model m version 0 {document['parent']}"
    assert "started from" not in rows  # nothing was trained before it
    assert rows["job"] == document["job"]
    assert rows["schedule"] == "s, firing 1: the 0th time"
    assert (rows["seed"], rows["steps"]) == ("0", f"2, the best was {document['best_step']}")
    assert rows["query"] == "points.find({}).fold('train')"
    assert abs(datetime.fromisoformat(rows["watermark"]) - datetime.now(UTC)) < timedelta(minutes=5)
    for fold in ("train", "valid"):
        assert rows[f"{fold} documents"] == f"{data[fold]['count']}, digest {data[fold]['digest']}"
    assert rows["metrics"] == f"objective {document['metrics']['objective']:.4g}"
    assert rows["verdict"] == "let through: every trained model goes live (Always())"
    assert f"torch {document['environment']['torch']}" in rows["environment"]


def test_lineage_ends_with_what_was_predicted(call: Call, db: Datalayer) -> None:
    (trained,) = retrained(db)
    db.predict("model", "m", select=db[COLLECTION].find({"_id": {"$lt": 7}}), into="guess")

    tree = [line for line in call("lineage", trained.uuid).stdout.splitlines() if "predicted" in line]
    told = json_util.loads(call("lineage", trained.uuid, "--json").stdout)

    assert len(tree) == 1
    assert f"predicted {COLLECTION}.guess: 7 in 1 run, succeeded" in tree[0]
    (predicted,) = told["predictions"]
    assert (predicted["collection"], predicted["into"]) == (COLLECTION, "guess")
    assert (predicted["written"], predicted["runs"], predicted["status"]) == (7, 1, "succeeded")
    assert datetime.fromisoformat(predicted["changed"]) > datetime.now(UTC) - timedelta(minutes=5)
    assert predicted["error"] == ""


def test_lineage_says_from_which_version_a_scheduled_run_started(call: Call, db: Datalayer) -> None:
    first, second = retrained(db, times=2)

    rows = pairs_of(call("lineage", second.uuid).stdout)

    assert rows["started from"].startswith(f"{first.uuid}, with the optimizer of ")


def test_lineage_goes_up_to_where_it_began(call: Call, db: Datalayer) -> None:
    *_, second, third = retrained(db, times=3)
    db.promote("model", "m", 2)

    tree = [line for line in call("lineage", third.uuid).stdout.splitlines() if "·" in line]
    told = json_util.loads(call("lineage", third.uuid, "--json").stdout)

    measured: Any = third.trainer
    (value,) = measured.metric_values["objective"][-1:]
    assert tree[0].startswith("model m version 3 · 2 steps · objective ")
    assert [line[4:].rsplit(" · objective")[0] for line in tree[1:]] == [
        "from model m version 2 · 2 steps",
        "from model m version 1 · 2 steps",
        "from model m version 0 · as it was given",
    ]
    assert [line.endswith(" · live") for line in tree] == [False, True, False, False]
    assert (told["uuid"], told["version"], told["live"]) == (third.uuid, 3, False)
    assert [(one["version"], one["live"]) for one in told["ancestors"]] == [(2, True), (1, False), (0, False)]
    assert told["ancestors"][0]["uuid"] == second.uuid
    assert told["metrics"]["objective"] in measured.metric_values["objective"]
    assert Query.from_document(told["data"]["query"]) == db[COLLECTION].find().fold("train")
    assert value > 0


def test_lineage_without_a_version_is_of_what_is_live_else_of_the_newest(call: Call, db: Datalayer) -> None:
    models = three(db)

    def uuid() -> str:
        told: str = json.loads(call("lineage", "model", "m", "--json").stdout)["uuid"]
        return told

    assert uuid() == models[2].uuid
    db.promote("model", "m", 1)
    assert uuid() == models[1].uuid
    assert "no run: it is as it was given" in call("lineage", "model", "m").stdout


def test_lineage_stops_where_it_is_told_to_and_where_an_ancestor_is_gone(call: Call, db: Datalayer) -> None:
    first, second = retrained(db, times=2)

    short = call("lineage", second.uuid, "--depth", "1").stdout.splitlines()
    none = json.loads(call("lineage", second.uuid, "--depth", "0", "--json").stdout)["ancestors"]
    db.remove("model", "m", 1, force=True)
    gone = call("lineage", second.uuid)

    assert short[-1].endswith("from older ones: --depth")
    assert "version 0 ·" not in "\n".join(short)
    assert none == []
    assert gone.exit_code == 0, gone.output
    assert gone.stdout.splitlines()[-1].endswith(f"from {first.uuid}, which is gone")
    told = json.loads(call("lineage", second.uuid, "--json").stdout)
    assert told["ancestors"] == [{"uuid": first.uuid, "gone": True}]


def test_lineage_of_a_trainer_and_of_a_version_without_lineage(
    call: Call, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Datalayer.connect(uri, lineage=False, valid_fraction=0.2, progress=False) as db:
        fill(db)
        pipeline = db[COLLECTION].aggregate([{"$match": {"y": {"$lt": 2}}}])
        trained = db.apply(trainer(pipeline, max_iterations=1, validation_interval=None)).result()

        of_model = call("lineage", trained.uuid)
        of_trainer = call("lineage", "trainer", "t")

    assert (of_model.exit_code, of_trainer.exit_code) == (0, 0), of_model.output + of_trainer.output
    assert "points.aggregate([{'$match': {'y': {'$lt': 2}}}]).fold('train')" in of_model.stdout
    assert "watermark" not in of_model.stdout
    assert "trainer t version 1 · 1 steps" in of_trainer.stdout
    assert "from trainer t version 0 · as it was given" in of_trainer.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("promote", "model", "m", "9"), "NotFoundError"),
        (("promote", "model", "m", "0", "--alias", "no name"), "IdentifierError"),
        (("promote", "model", "m", "0", "--uuid", "no-such-uuid"), "ParameterError"),
        (("rollback", "model", "m"), "NotFoundError"),
        (("diff", "no-such-uuid", "nor-this"), "NotFoundError"),
        (("lineage", "no-such-uuid"), "NotFoundError"),
        (("lineage", "model", "nobody"), "NotFoundError"),
        (("lineage", "model", "m", "9"), "NotFoundError"),
        (("history", "model", "m", "--uri", "ftp://me:hunter2@host/x"), "SettingError"),
    ],
)
def test_an_error_is_one_line(call: Call, db: Datalayer, arguments: tuple[str, ...], said: str) -> None:
    three(db)

    done = call(*arguments)

    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{said}: ")
    assert "hunter2" not in done.output


def test_two_who_promote_at_once_are_told_who_was_faster(
    call: Call, db: Datalayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    three(db)
    promote = Datalayer.promote

    def late(self: Datalayer, *name: Any, **given: Any) -> Any:
        promote(db, "model", "m", 0, who="ann", why="first")
        return promote(self, *name, **{**given, "expected": None})

    monkeypatch.setattr(Datalayer, "promote", late)

    done = call("promote", "model", "m", "1")

    assert done.exit_code == 1
    assert done.stderr.startswith("ConflictError: ")
    assert "ann" in done.stderr
