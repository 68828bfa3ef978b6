"""The commands of every day: train a script, watch the job, compare versions, predict, look at the server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.printed import columns_of, lines_of
from tests.helpers import fill, trainer
from typer.testing import CliRunner

from mongotorch import Datalayer, TorchModel
from mongotorch.cli import app

Call = Callable[..., Any]

SCRIPT = """
import torch
from mongotorch import TorchModel, TorchTrainer

def digits(db):
    return TorchTrainer(
        "own", key=("x", "y"), select=db["points"].find(), objective=torch.nn.functional.cross_entropy,
        loader_kwargs={"batch_size": 8}, max_iterations=2, model=TorchModel("own", object=torch.nn.Linear(4, 3)),
    )

nothing = 3
"""


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, uri: str) -> Call:
    """Run the command on the test's database."""
    monkeypatch.setenv("MONGOTORCH_URI", uri)
    monkeypatch.setenv("MONGOTORCH_PROGRESS", "false")
    return lambda *arguments, **given: CliRunner().invoke(app, list(arguments), **given)


def test_a_script_is_trained(call: Call, db: Datalayer, tmp_path: Path) -> None:
    fill(db)
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)

    done = call("train", f"{script}:digits", "--json")
    other = call("train", f"{script}:nothing")
    unnamed = call("train", str(script))

    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["identifier"], found["version"]) == ("own", 1)
    assert db.load(uuid=found["uuid"]).version == 1
    assert other.stderr == f"Error: 'nothing' of {script} is of type int, not a trainer\n"
    assert f"{script} has no trainer; say which: {script}:NAME; its functions are digits" in unnamed.stderr


def test_a_wrong_script_is_one_sentence_and_makes_no_database(
    call: Call, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, broken = tmp_path / "mine.py", tmp_path / "broken.py"
    script.write_text(SCRIPT)
    broken.write_text("def make(db):\n    return db.nothing\n\nvalue = 1\n")
    (tmp_path / "text.txt").write_text("")
    (tmp_path / "syntax.py").write_text("def (")
    monkeypatch.setenv("MONGOTORCH_URI", f"embedded:{tmp_path / 'none'}")

    for source, said in {
        f"{script}:digist": f"Error: {script} defines no 'digist'; did you mean 'digits'?\n",
        f"{tmp_path}/none.py": f"Error: there is no file '{tmp_path}/none.py'\n",
        f"{tmp_path}/text.txt": f"Error: '{tmp_path}/text.txt' is no Python file\n",
    }.items():
        done = call("train", source)
        assert (done.exit_code, done.stderr) == (2, said)
    done = call("train", str(tmp_path / "syntax.py"))
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == "SyntaxError: invalid syntax"
    assert not (tmp_path / "none").exists()

    monkeypatch.setenv("MONGOTORCH_URI", uri)
    lines = call("train", f"{broken}:make").stderr.splitlines()
    assert lines[1] == f'  File "{broken}", line 2, in make'
    assert lines[-1].startswith("AttributeError:")


def test_a_job_is_named_by_the_first_characters_of_its_uuid(call: Call, db: Datalayer) -> None:
    job = db.apply(trainer(fill(db)))

    assert json.loads(call("job", job.uuid[:6], "--json").stdout)["_id"] == job.uuid
    assert db.job(job.uuid[:6]).uuid == job.uuid
    assert call("job", job.uuid[:-1] + "zz").exit_code == 1


def test_watch_ends_with_the_job(call: Call, db: Datalayer) -> None:
    job = db.apply(trainer(fill(db)))

    done = call("watch", job.uuid)

    assert done.exit_code == 0
    assert done.stdout.splitlines()[-1].startswith("succeeded  step ")


def test_versions_are_compared_by_a_metric(call: Call, db: Datalayer) -> None:
    first = trainer(fill(db), max_iterations=2, validation_interval=1)
    db.apply(first).result()
    db.apply(first.replace(max_iterations=6)).result()
    db.promote("model", "m", 1)

    columns = columns_of(call("compare", "model", "m").stdout)
    by = json.loads(call("compare", "model", "m", "--by", "objective", "--json").stdout)

    assert set(columns) == {"version", "created", "live", "steps", "objective"}
    assert columns["live"][columns["version"].index("1")] == "live"
    assert [row["metrics"]["objective"] for row in by] == sorted(row["metrics"]["objective"] for row in by)


class Named(torch.nn.Module):
    """Takes its arguments by name, one of them ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 2)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": x + self.embedding(ids), "odd": x / 0}


def test_an_object_gives_arguments_by_name_and_ids_stay_whole(call: Call, db: Datalayer) -> None:
    model: Any = db.apply(TorchModel("named", object=Named())).result()
    given = '{"x": [1.0, -1.0], "ids": 3}'

    done = call("predict", "model", "named", '{"ids": [3, 4], "x": [[1.0, -1.0], [0.5, 0]]}', "--integers")
    without = call("predict", "model", "named", '{"x": [[1, 2], [3, 4]], "ids": [3, 4]}')

    assert call("predict", "model", "named", given).exit_code == 0
    found = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    expected = model.object.embedding(torch.tensor([3, 4])) + torch.tensor([[1.0, -1.0], [0.5, 0]])
    assert torch.allclose(torch.tensor(found["sum"]), expected)
    assert found["odd"] == [["inf", "-inf"], ["inf", "nan"]]
    assert without.exit_code == 1
    assert without.stderr.endswith("; with --integers whole numbers stay whole\n")


def test_documents_are_predicted_into_a_field(call: Call, db: Datalayer) -> None:
    db.apply(trainer(fill(db))).result()
    into = ("predict", "model", "m", "--collection", "points", "--into", "guess")
    given = (*into, "--filter", '{"n": {"$lt": 50}}')

    done = call(*given)
    again = call(*given)
    db["points"].raw.update_one({"_id": 110}, {"$set": {"x": [1.0]}})
    broken = call(*into)

    assert done.stdout == "model m version 1 predicted 50 documents of points into guess\n", done.output
    assert "0 documents" in again.stdout
    assert "already" in again.stdout
    assert (broken.exit_code, broken.stdout) == (1, "")
    assert "document 110" in broken.stderr
    assert "the same call goes on" in broken.stderr
    assert db["points"].count({"guess.version": 1}) >= 50


def test_a_model_predicts_json(call: Call, db: Datalayer) -> None:
    model = db.apply(trainer(fill(db))).result()
    rows = [[0.0, 1.0, 2.0, 3.0], [1.0, 0.0, 0.0, 0.0]]

    one = json.loads(call("predict", "model", "m", json.dumps(rows[0])).stdout)
    both = json.loads(call("predict", "model", "m", "-", "--batch", input=json.dumps(rows)).stdout)

    import torch

    assert torch.allclose(torch.tensor(one), model.predict(torch.tensor(rows[0])))
    assert torch.allclose(torch.tensor(both[1]), model.predict(torch.tensor(rows[1])))


def test_doctor_looks_at_the_server(call: Call, uri: str) -> None:
    done = call("doctor")
    told = json.loads(call("doctor", "--json").stdout)

    assert done.exit_code == 0, done.output
    checks = {check["name"]: check for check in told["checks"]}
    if uri.startswith("mongomock:"):
        assert set(checks) == {"server"}
        return
    assert set(checks) == {"version", "replica set", "permissions", "clock", "disk", "indexes"}
    assert checks["replica set"]["text"].startswith("rs0, 1 member")
    assert not [check for check in checks.values() if check["state"] in ("problem", "unknown")]
    assert "hunter2" not in done.output


def test_a_table_in_a_pipe_is_a_line_a_row(call: Call, db: Datalayer) -> None:
    job = db.apply(trainer(fill(db)))

    heading, row = lines_of(call("jobs").stdout)

    assert heading[:3] == ["job", "component", "status"]
    assert row[:3] == [job.uuid, "trainer t", "succeeded"]
