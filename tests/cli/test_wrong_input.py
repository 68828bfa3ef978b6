"""What the command does with wrong input: one sentence, an exit code that is not 0, and no database made."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import fill, trainer
from typer.testing import CliRunner

from mongotorch import Datalayer
from mongotorch.cli import app

Call = Callable[..., Any]

WRONG = [
    ("jobs", "--limit", "-3"),
    ("jobs", "--limit", "0"),
    ("jobs", "--limit", "many"),
    ("jobs", "--status", "finished"),
    ("jobs", "extra"),
    ("job",),
    ("job", ""),
    ("job", "ffff"),
    ("job", "no such job"),
    ("job", "$gt"),
    ("watch", "ffff"),
    ("watch", "ffff", "--timeout-s", "-1"),
    ("cancel", "ffff"),
    ("stop", "ffff"),
    ("metrics", "ffff"),
    ("show", "modle"),
    ("show", "model", "n"),
    ("show", "model", "m", "99"),
    ("show", "model", "m", "-1"),
    ("show", "model", "m", "one"),
    ("compare", "modle", "m"),
    ("compare", "model", "n"),
    ("compare", "model", "m", "--by", "accurancy"),
    ("predict", "model", "m", "{"),
    ("predict", "model", "n", "[1.0]"),
    ("predict", "trainer", "t", "[1.0]"),
    ("predict", "model", "m", "[1.0]", "--version", "99"),
    ("predict", "model", "m", "1", "--batch"),
    ("predict", "model", "m", "[1.0]"),
    ("predict", "model", "m", '"text"'),
    ("predict", "model", "m", "null"),
    ("predict", "model", "m", "[[1.0], [1.0, 2.0]]", "--batch"),
    ("predict", "model", "m"),
    ("predict", "model", "m", "--collection", "points"),
    ("predict", "model", "m", "--collection", "points", "--into", "x"),
    ("predict", "model", "m", "--collection", "pionts", "--into", "p"),
    ("predict", "model", "m", "--collection", "points", "--into", "p", "--filter", "{"),
    ("predict", "model", "m", "--collection", "points", "--into", "p", "--filter", "[]"),
    ("predict", "model", "m", "--collection", "points", "--into", "p", "--key", "missing"),
    ("promote", "model", "m", "99"),
    ("promote", "model", "n"),
    ("promote", "model", "m", "--alias", ""),
    ("rollback", "model", "m"),
    ("history", "model", "m", "--at", "yesterday"),
    ("diff", "ffff", "eeee"),
    ("lineage", "ffff"),
    ("lineage", "model", "m", "--depth", "-1"),
    ("gc", "--grace-s=-1"),
    ("gc", "--grace-s", "nan"),
    ("verify", "--repair", "/no/such/folder"),
    ("schedule", "pause", "no-schedule"),
    ("schedule", "run", "no-schedule"),
    ("schedule", "preview", "no-schedule", "--since", "2026-01-01"),
    ("train", "no_such_file.py"),
    ("worker", "--concurrency", "0"),
    ("demo", "--steps", "0"),
    ("no-such-command",),
]


@pytest.fixture(scope="module")
def trained() -> Any:
    """A database in memory with a trained model."""
    with Datalayer.connect("mongomock://wrong_input", progress=False) as db:
        db.apply(trainer(fill(db))).result()
        yield db


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_input_is_a_sentence_and_never_success(
    trained: Datalayer, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setenv("MONGOTORCH_URI", "mongomock://wrong_input")
    blobs = trained["mt.artifacts.files"].raw.count_documents({})

    done = CliRunner().invoke(app, list(arguments))

    assert done.exit_code in (1, 2), done.output
    assert not isinstance(done.exception, Exception) or isinstance(done.exception, SystemExit), done.exception
    assert done.stderr.strip()
    assert "Traceback" not in done.output
    assert trained["mt.artifacts.files"].raw.count_documents({}) == blobs


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (("show", "modle"), "did you mean 'model'?"),
        (("show", "model", "mm"), "did you mean 'm'?"),
        (("compare", "model", "m", "--by", "objectiv"), "did you mean 'objective'?"),
        (("predict", "model", "m", "--collection", "point", "--into", "p"), "did you mean 'points'?"),
    ],
)
def test_what_was_meant_is_named(
    trained: Datalayer, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], meant: str
) -> None:
    monkeypatch.setenv("MONGOTORCH_URI", "mongomock://wrong_input")

    assert meant in CliRunner().invoke(app, list(arguments)).stderr


@pytest.mark.parametrize(
    "arguments",
    [("jobs",), ("show",), ("gc",), ("lineage", "model", "m"), ("verify",), ("doctor",), ("dashboard",)],
)
def test_a_reading_command_makes_no_database(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    monkeypatch.delenv("MONGOTORCH_URI", raising=False)
    monkeypatch.chdir(tmp_path)

    done = CliRunner().invoke(app, list(arguments))

    assert done.exit_code == 1
    assert done.stderr.startswith("NotFoundError: there is no database in ")
    assert list(tmp_path.iterdir()) == []


def test_a_reading_command_makes_nothing_on_a_server(mongod: str) -> None:
    uri = f"mongodb://{mongod}/cli_untouched?replicaSet=rs0"

    done = CliRunner().invoke(app, ["jobs", "--uri", uri])

    assert done.exit_code == 1
    assert "nothing of mongotorch is in the database 'cli_untouched'" in done.stderr
    with Datalayer.connect(f"mongodb://{mongod}/other?replicaSet=rs0") as other:
        assert "cli_untouched" not in other._connection.client.list_database_names()


def test_the_version_is_told_without_torch() -> None:
    code = (
        "import sys; from mongotorch.cli import app; from typer.testing import CliRunner; "
        "done = CliRunner().invoke(app, ['--version']); "
        "print(done.stdout.strip(), 'torch' in sys.modules, 'pymongo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split()[1:] == ["False", "False"]


def test_an_address_is_taken_before_or_behind_the_command(
    trained: Datalayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MONGOTORCH_URI", raising=False)

    before = CliRunner().invoke(app, ["--uri", "mongomock://wrong_input", "show", "model"])
    behind = CliRunner().invoke(app, ["show", "model", "--uri", "mongomock://wrong_input"])

    assert before.stdout == behind.stdout == "m\n"
