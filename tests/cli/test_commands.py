"""The command `mongotorch`: the demo, what there is, what became of the runs; an error is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mongotorch import Datalayer, Job, TorchModel, TorchTrainer, __version__
from mongotorch.cli import app
from mongotorch.demo.digits import run_demo
from mongotorch.errors import EmbeddedServerError
from mongotorch.mongo.embedded_server import EmbeddedServer

Call = Callable[..., Any]
NOWHERE = "mongodb://me:hunter2@127.0.0.1:1/shop?serverSelectionTimeoutMS=100&authSource=admin"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, uri: str) -> Call:
    """Run the command on the test's database."""
    monkeypatch.setenv("MONGOTORCH_URI", uri)
    monkeypatch.setenv("MONGOTORCH_PROGRESS", "false")
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def explode(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.sum() + target.sum()) * float("nan")


def apply(db: Datalayer, **given: Any) -> Job[Any]:
    db["points"].insert_many({"_id": n, "x": [float(n % 3), 1.0], "y": n % 2} for n in range(40))
    said = {
        "key": ("x", "y"),
        "select": db["points"].find(),
        "objective": torch.nn.functional.cross_entropy,
        "loader_kwargs": {"batch_size": 10},
        "max_iterations": 3,
        "model": TorchModel("points", object=torch.nn.Linear(2, 2)),
    }
    return db.apply(TorchTrainer("points-trainer", **{**said, **given}))


def test_the_demo_trains_and_says_where(call: Call, db: Datalayer, uri: str) -> None:
    done = call("demo", "--steps", "3")

    assert done.exit_code == 0, done.output
    first, *table = done.stdout.splitlines()
    kind = "a MongoDB server" if uri.startswith("mongodb:") else "in the memory of this process"
    assert first == f"database: {uri} ({kind})"
    said = "\n".join(table)
    for wanted in ("1797", "samples per second", "validation accuracy", db.load("model", "demo-digits").uuid):
        assert wanted in said
    assert ("loaded by uuid" in said) == uri.startswith("mongodb:")


def test_the_demo_takes_the_embedded_server_where_no_database_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MONGOTORCH_URI", raising=False)
    monkeypatch.setenv("MONGOTORCH_EMBEDDED_PATH", str(tmp_path / "db"))
    monkeypatch.setenv("MONGOTORCH_PROGRESS", "false")

    done = CliRunner().invoke(app, ["demo", "--steps", "1"])

    assert done.exit_code == 0, done.output
    first = f"database: embedded:{tmp_path / 'db'}?db=mongotorch (the embedded MongoDB server)"
    assert done.stdout.splitlines()[0] == first
    assert "loaded by uuid" in done.stdout


def test_the_demo_takes_the_memory_where_there_is_no_server_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path, **_: Any) -> None:
        raise EmbeddedServerError("no embedded mongod: the extra is not installed")

    monkeypatch.delenv("MONGOTORCH_URI", raising=False)
    monkeypatch.setattr(EmbeddedServer, "open", missing)
    monkeypatch.setenv("MONGOTORCH_PROGRESS", "false")

    done = CliRunner().invoke(app, ["demo", "--steps", "1"])

    assert done.exit_code == 0, done.output
    assert "the extra is not installed" in done.stdout
    assert "database: mongomock://demo (in the memory of this process)" in done.stdout


def test_the_demo_run_again_trains_again_and_inserts_nothing(db: Datalayer) -> None:
    first = run_demo(db, steps=1)

    again = run_demo(db, steps=1)

    assert again.version > first.version
    assert db["demo_digits"].count() == again.documents == 1797


def test_show_goes_from_kinds_to_one_version(call: Call, db: Datalayer) -> None:
    apply(db).result()

    assert call("show").stdout.split() == ["model", "trainer"]
    assert call("show", "model").stdout.split() == ["points"]
    heading, given, trained = call("show", "model", "points").stdout.splitlines()
    assert heading.split()[:4] == ["version", "created", "trained", "live"]
    assert (given.split()[0], trained.split()[0]) == ("0", "1")
    document = json.loads(call("show", "model", "points", "1").stdout)
    assert (document["_id"], document["version"]) == (db.load("model", "points").uuid, 1)


def test_what_show_prints_as_json_is_json(call: Call, db: Datalayer) -> None:
    apply(db).result()

    assert json.loads(call("show", "--json").stdout) == ["model", "trainer"]
    rows = json.loads(call("show", "model", "points", "--json").stdout)
    assert [(row["version"], row["trained"], row["steps"]) for row in rows] == [(0, False, None), (1, True, 3)]
    assert rows[1]["nbytes"] == 4 * 6  # the weights of Linear(2, 2) in float32
    trainer = json.loads(call("show", "trainer", "points-trainer", "0", "--json").stdout)
    assert trainer["fields"]["max_iterations"] == 3


def test_jobs_lists_the_runs_the_newest_first(call: Call, db: Datalayer) -> None:
    good = apply(db)
    bad = db.apply(good.component.replace(objective=explode, identifier="bad"))

    table = call("jobs").stdout
    records = json.loads(call("jobs", "--json").stdout)

    assert table.index(bad.uuid) < table.index(good.uuid)
    assert "NonFiniteLossError" in table
    assert [(r["_id"], r["status"]) for r in records] == [(bad.uuid, "failed"), (good.uuid, "succeeded")]
    failed = json.loads(call("jobs", "--status", "failed", "--json").stdout)
    assert [record["_id"] for record in failed] == [bad.uuid]
    assert len(json.loads(call("jobs", "--limit", "1", "--json").stdout)) == 1


def test_job_shows_one_run_and_the_traceback_of_its_error(call: Call, db: Datalayer) -> None:
    job = apply(db, objective=explode)

    said = call("job", job.uuid)
    record = json.loads(call("job", job.uuid, "--json").stdout)

    assert said.exit_code == 0
    assert "points-trainer" in said.stdout
    assert "Traceback (most recent call last)" in said.stdout
    assert (record["status"], record["error"]["type"]) == ("failed", "NonFiniteLossError")


def test_a_worker_performs_what_waits(call: Call, db: Datalayer, uri: str) -> None:
    with Datalayer.connect(uri, compute="queue") as queue:
        job = apply(queue)
        assert job.status == "queued"

        done = call("worker", "--until-idle")

        assert done.exit_code == 0, done.output
        assert done.stdout.splitlines()[-1].startswith("1 job")
        assert job.result(timeout=1).version == 1


def test_a_run_that_waits_is_cancelled_and_never_performed(call: Call, uri: str) -> None:
    with Datalayer.connect(uri, compute="queue") as queue:
        job = apply(queue)
        other = queue.apply(job.component.replace(identifier="other", max_iterations=4))

        said = call("cancel", job.uuid)
        told = json.loads(call("cancel", other.uuid, "--json").stdout)

        assert (said.exit_code, said.stdout) == (0, f"job {job.uuid} is cancelled\n")
        assert told == {"uuid": other.uuid, "cancelled": True, "status": "cancelled"}
        assert (job.status, other.status) == ("cancelled", "cancelled")
        assert call("worker", "--until-idle").stdout.splitlines()[-1].startswith("0 job")
        assert queue.show("model", "points") == [0]


def test_a_run_that_had_ended_is_left_as_it_is(call: Call, db: Datalayer) -> None:
    job = apply(db)
    job.result()

    said = call("cancel", job.uuid)
    told = call("cancel", job.uuid, "--json")

    assert (said.exit_code, told.exit_code) == (1, 1)
    assert said.stdout == f"job {job.uuid} had ended already: it succeeded\n"
    assert json.loads(told.stdout) == {"uuid": job.uuid, "cancelled": False, "status": "succeeded"}
    assert job.status == "succeeded"


def test_gc_says_what_it_would_collect_and_then_collects_it(call: Call, db: Datalayer) -> None:
    apply(db).result()
    db.remove("model", "points", 0, force=True)
    stray = db["mt.artifacts.files"].raw
    left = stray.count_documents({})

    would = json.loads(call("gc", "--dry-run", "--grace-s", "0", "--json").stdout)
    assert stray.count_documents({}) == left
    does = json.loads(call("gc", "--grace-s", "0", "--json").stdout)

    assert sorted(would["blobs"]) == sorted(does["blobs"])
    assert stray.count_documents({}) == left - len(does["blobs"])
    assert call("verify").exit_code == 0


def test_verify_ends_with_an_error_where_a_blob_was_changed(call: Call, db: Datalayer) -> None:
    apply(db).result()
    assert json.loads(call("verify", "--json").stdout)["problems"] == []
    chunk = db["mt.artifacts.chunks"].raw.find_one()
    db["mt.artifacts.chunks"].raw.update_one({"_id": chunk["_id"]}, {"$set": {"data": b"x" * len(chunk["data"])}})

    done = call("verify", "--json")

    assert done.exit_code == 1
    assert len(json.loads(done.stdout)["problems"]) >= 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("show", "model", "nothing", "3"), "NotFoundError"),
        (("job", "no-such-job"), "NotFoundError"),
        (("cancel", "no-such-job"), "NotFoundError"),
        (("show", "--uri", "ftp://me:hunter2@host/x"), "SettingError"),
        (("show", "--uri", NOWHERE), "ServerUnavailableError"),
        (("jobs", "--uri", NOWHERE), "ServerUnavailableError"),
        (("demo", "--uri", NOWHERE), "ServerUnavailableError"),
        (("worker", "--once", "--uri", NOWHERE), "ServerUnavailableError"),
    ],
)
def test_an_error_is_one_line_without_a_traceback_or_a_password(
    call: Call, arguments: tuple[str, ...], said: str
) -> None:
    done = call(*arguments)

    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{said}: ")
    assert "Traceback" not in done.output
    assert "hunter2" not in done.output


def test_the_database_is_told_without_its_password(monkeypatch: pytest.MonkeyPatch, mongod: str) -> None:
    monkeypatch.setenv("MONGOTORCH_SERVER_TIMEOUT_S", "5")

    done = CliRunner().invoke(app, ["demo", "--steps", "1", "--uri", f"mongodb://me:hunter2@{mongod}/cli"])

    assert done.exit_code == 1  # the server knows no such user
    assert "hunter2" not in done.output


def test_the_command_runs_as_a_program(mongod: str) -> None:
    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mongotorch", *arguments]
        return subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )

    assert run("--version").stdout.strip() == __version__
    nothing = run("jobs", "--json", MONGOTORCH_URI=f"mongodb://{mongod}/cli_nothing?replicaSet=rs0")
    assert (nothing.returncode, nothing.stdout) == (1, "")
    assert "nothing of mongotorch is in the database 'cli_nothing'" in nothing.stderr
    failed = run("show", MONGOTORCH_URI=NOWHERE)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("ServerUnavailableError: ")
    assert len(failed.stderr.splitlines()) == 1
    assert "hunter2" not in failed.stderr
