"""What every public class shows of itself: short at 80 columns, whole in a notebook, and never a secret."""

from __future__ import annotations

import importlib.util
import inspect
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

import mongotorch as mt
from mongotorch import Datalayer, NewDocuments, Schedule, Worker
from mongotorch.codecs import Codecs, NamedBlob, NewBlobs, Opaque, PowerOfTen
from mongotorch.data import Report
from mongotorch.jobs import LocalEngine, QueueEngine
from mongotorch.mirrors import MirroredRun
from mongotorch.settings import read_settings
from tests.helpers import COLLECTION, fill, model, points, trainer
from tests.test_reprs import html_of

ROOT = Path(__file__).parents[1]
SECRET = "hunter2-hunter2-hunter2"
WIDTH, MOST_LINES = 80, 14
# Nobody prints these: what others derive from, what tests inherit, and what arrays are stored as.
NOT_SHOWN = {
    *("Codec", "Component", "Engine", "Gate", "JobRecords", "Lease", "MetricMirror", "Mirror", "Split", "Trigger"),
    *("CodecSuite", "EngineSuite", "LauncherSuite", "ProcessLauncherSuite", "StoreSuite", "TriggerSuite"),
    *("WaitingEngineSuite", "Thing", "ArrayParts", "FileBytes", "Pickled", "Scores", "State"),
}


def accuracy(output: Any, target: Any) -> Any:
    return (output.argmax(-1) == target).float().mean()


def public_classes() -> dict[str, type]:
    """The classes that the reference names."""
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.public().items()
    return {n: v for n, v in found if inspect.isclass(v) and not issubclass(v, BaseException)}


def from_a_run(db: Datalayer, folder: Path) -> Iterator[Any]:
    """What a run and a schedule give to people."""
    metric = mt.Metric("accuracy", object=accuracy)
    select = fill(db)
    dataset = mt.Dataset("d", select=select)
    validation = mt.Validation("v", metrics=(metric,), datasets=(dataset,))
    wide = torch.nn.Sequential(*(torch.nn.Linear(4 if n == 0 else 8, 8 if n < 19 else 3) for n in range(20)))
    run = trainer(select, log_interval=1, model=model(object=wide, validation=validation), max_iterations=12)
    job = db.apply(run)
    version = job.result()
    yield from (
        metric,
        dataset,
        validation,
        run,
        job,
        version,
        db.metrics(job),
        db.metrics(job).rows[0],
        db.jobs(),
        select,
    )
    summary = db.summary(version)
    yield from (summary, summary.layers[0], db[COLLECTION])
    yield db.promote("model", "m", 1, why="w" * 2000)
    yield db.predict("model", "m", select=db[COLLECTION].find(), into="guess", key="x")
    check = db.check(select)
    yield from (check, check.fields[0], db.explain(run))
    with db.stream(select, key=("x", "y"), batch_size=8) as stream:
        yield stream
    db.apply(run.replace(max_iterations=2, optimizer_kwargs={"lr": 0.02}), force=True).result()
    yield db.diff(version.uuid, db.show("model", "m", 2)["_id"])
    yield db.trained_on(3)[0]
    yield db.reproduce(version.uuid)
    yield db.export(folder / "m.zip", uuid=version.uuid)
    schedule = Schedule("s", trainer=run, trigger=NewDocuments(30), gate=mt.Better())
    yield from (schedule, schedule.trigger, schedule.gate)
    db.apply(schedule)
    yield db.preview(schedule, since=datetime(2000, 1, 1, tzinfo=UTC))
    db[COLLECTION].raw.insert_many([{**row, "_id": 1000 + row["_id"]} for row in points(30)])
    Worker(db).run(until_idle=True)
    found = mt.Verdict(promote=True, why="w" * 500, gate="Better")
    yield from (found, Worker(db), db.gc(), db.verify(), db.history("model", "m"), db.show("model", "m"), db)
    with db.live("model", "m") as live:
        yield live


def values() -> Iterator[Any]:
    """What people make themselves."""
    now = datetime(2026, 5, 3, tzinfo=UTC)
    yield from (mt.Always(), mt.Never(), mt.Cron("0 3 * * *"), mt.Every(3600), mt.Changed(10))
    below = mt.MetricBelow("accuracy", 0.9)
    yield from (below, mt.MetricAbove("objective", 1.0), mt.AnyOf(below, mt.Changed(3)), mt.AllOf(below))
    yield from (mt.ByHash(0.1), mt.ByStoredFold(), mt.ByTime("when", after=now), mt.ByGroup("user", 0.2))
    yield from (mt.KFold(5, k=0), mt.Decision(True, "because " * 100), mt.Passed(args=(1,), kwargs={}))
    yield mt.Firing(at=now, reason="w" * 500)
    yield from (Codecs.default(), NamedBlob.of(b"0" * 10_000), NewBlobs(), Opaque("<torch>"), PowerOfTen(10**100))
    yield from (LocalEngine(), QueueEngine(), Report())
    about = {"job": "j", "attempt": 1, "type_id": "trainer", "identifier": "t", "status": "running"}
    yield MirroredRun(**about, parameters={"lr": 0.1}, created=now, finished=None)  # type: ignore[arg-type]
    yield read_settings(
        uri=f"mongodb://u:{SECRET}@h.example/db",
        signing_key=f"hmac:{SECRET}",
    )


def test_every_public_value_is_short_and_keeps_secrets(tmp_path: Path) -> None:
    with Datalayer.connect("mongomock://reprs", progress=False, signing_key=f"hmac:{SECRET}") as db:
        shown: set[str] = set()
        for value in (*values(), *from_a_run(db, tmp_path)):
            name = type(value).__name__
            shown |= {cls.__name__ for cls in type(value).__mro__}
            text = repr(value)
            lines = [part for line in text.splitlines() for part in textwrap.wrap(line, WIDTH) or [""]]
            most = MOST_LINES + (len(value.layers) if name == "ModelSummary" else 0)
            assert len(lines) <= most, f"{name}: {len(lines)} lines\n{text[:2000]}"
            assert " object at 0x" not in text, f"{name} shows its address: {text}"
            assert SECRET not in text + str(value), name
            if hasattr(value, "_repr_html_"):
                assert SECRET not in html_of(value), name
    missing = public_classes().keys() - shown - NOT_SHOWN
    assert missing == set()


@pytest.mark.parametrize("kind", ["model", "metric"])
def test_lists_of_a_datalayer_are_tables(db: Datalayer, kind: str) -> None:
    for seed in range(12):
        db.apply(model(seed) if kind == "model" else mt.Metric("m", object=accuracy, artifacts={}), force=True)
    found = db.show(kind, "m")
    assert found == list(range(12)) if kind == "model" else [0]
    assert "<table>" in html_of(found)
    if kind == "model":
        assert repr(found) == "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, … and 2 more]"
        db.promote("model", "m", 3, why="<script>")
        assert "&lt;script&gt;" in html_of(db.history("model", "m"))
        assert "live" in html_of(found)
        assert "m" in html_of(db)


def test_a_run_without_a_number_of_steps_says_so_shortly(db: Datalayer) -> None:
    assert "max_iterations: 'int' = 10**100," in str(inspect.signature(mt.TorchTrainer))
    first = trainer(fill(db))
    assert (
        type(
            mt.TorchTrainer(
                "u", key="x", select=first.select, objective=torch.nn.functional.mse_loss
            ).max_iterations
        )
        is int
    )
    db.apply(first.replace(max_iterations=10**100, max_seconds=0.01)).result()
    db.apply(first).result()
    found = str(db.diff(db.show("model", "m", 1)["_id"], db.show("model", "m", 2)["_id"]))
    assert "10**100" in found
    assert "0" * 30 not in found
