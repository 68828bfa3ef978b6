"""What a user's editor knows: pyright in strict mode finds nothing in a script, and the types that it shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import torch
from mongotorch import Cron, Datalayer, Metric, Schedule, TorchModel, TorchTrainer


def halved(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x / 2, y


with Datalayer.connect("mongomock://shop") as db:
    db["points"].insert_many({"x": [1.0, float(n)], "y": n % 2} for n in range(100))
    net = torch.nn.Sequential(torch.nn.Linear(2, 2))
    trainer = TorchTrainer(
        "t",
        key=("x", "y"),
        select=db["points"].find({"y": {"$exists": True}}).sort("_id"),
        objective=torch.nn.functional.cross_entropy,
        transform=halved,
        loader_kwargs={"batch_size": 10},
        max_iterations=10,
        model=TorchModel("m", object=net),
    )
    job = db.apply(trainer)
    model = job.result()
    reveal_type(job)
    reveal_type(model)
    reveal_type(db.apply(Metric("n", object=halved)))
    reveal_type(db.apply(Schedule("s", trainer=trainer, trigger=Cron("0 3 * * *"))))
    reveal_type(db.load("model", "m"))
    reveal_type(db.load("trainer", "t", 0))
    reveal_type(db.load("metric", "n", alias="live"))
    reveal_type(db.load("schedule", "s"))
    reveal_type(db.load(uuid=model.uuid))
    print(model.identifier, model.version, model.predict(torch.ones(2)))
    for step, kind, values, _ in db.metrics(job):
        print(step, kind, values["objective"])
    with db.stream(db["points"].find(), key=("x", "y"), batch_size=5) as stream:
        for batch in stream:
            print(batch)
    for document in db.execute(db["points"].find()):
        print(document["x"])
    db.promote("model", "m", model.version, why="tried")
    print([move.who for move in db.history("model", "m")], db.show("model"))
"""
SHOWN = [
    "Job[TorchModel]",
    "TorchModel",
    "Job[Metric]",
    "Job[Schedule]",
    "TorchModel",
    "TorchTrainer",
    "Metric",
    "Schedule",
    "Any",
]


def checked(folder: Path, script: str) -> list[dict[str, Any]]:
    """What pyright says of a script; the test is skipped where it cannot be had."""
    pytest.importorskip("pyright", reason="pyright is not installed: pip install 'mongotorch[dev]'")
    (folder / "script.py").write_text(script, encoding="utf-8")
    settings = {"typeCheckingMode": "strict", "reportUnnecessaryTypeIgnoreComment": True}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    try:
        report: list[dict[str, Any]] = json.loads(ran.stdout)["generalDiagnostics"]
    except json.JSONDecodeError:
        pytest.skip(f"pyright cannot be started here: {(ran.stderr or ran.stdout)[-300:]}")
    return report


def test_a_strict_editor_finds_nothing_in_a_users_script(tmp_path: Path) -> None:
    found = checked(tmp_path, SCRIPT)
    wrong = [f"{one['range']['start']['line']}: {one['message']}" for one in found if one["severity"] == "error"]
    assert wrong == []
    shown = [one["message"].split('is "')[1].rstrip('"') for one in found if one["severity"] == "information"]
    assert shown == SHOWN


def test_a_strict_editor_finds_wrong_arguments(tmp_path: Path) -> None:
    wrong = SCRIPT.replace('"m", model.version', '"m", "newest"').replace("Metric(", "Metric(3, ")
    found = [one["message"] for one in checked(tmp_path, wrong) if one["severity"] == "error"]
    assert len(found) >= 2
