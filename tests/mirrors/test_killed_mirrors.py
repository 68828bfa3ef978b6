"""Mirrors that are killed again and again during a run: each value is in their targets exactly once."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from tests.mirrors.mirrored import in_mlflow, in_tensorboard, kill_during_a_run, measured, update

from mongotorch import Datalayer

pytest.importorskip("tensorboard")
pytest.importorskip("mlflow")
pytest.importorskip("alembic")
from mlflow import MlflowClient

pytestmark = [pytest.mark.fault, pytest.mark.filterwarnings("ignore:The ``noload``")]
KILLS = 20


def size(folder: Path) -> int:
    """How many bytes the files below a folder have."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def logged(database: Path) -> int:
    """How many values MLflow has stored."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60)) as opened:
        return int(opened.execute("SELECT count(*) FROM metrics").fetchone()[0])


@pytest.mark.timeout(1800)
def test_mirrors_killed_twenty_times_during_a_run_write_each_value_once(server_uri: str, tmp_path: Path) -> None:
    events, database = tmp_path / "events", tmp_path / "runs.db"
    store = f"sqlite:///{database}"
    MlflowClient(tracking_uri=store).search_experiments(max_results=1)  # it makes its tables
    to = {f"tensorboard:{events}": lambda: size(events), f"mlflow:{store}": lambda: logged(database)}
    with Datalayer.connect(server_uri, progress=False, compute="queue", valid_fraction=0.2) as db:
        job = kill_during_a_run(server_uri, db, to, KILLS)
        for one in to:
            update(server_uri, one)
            assert update(server_uri, one) == 0
        expected = measured(db, job)
        assert len(expected) > 200
        assert in_tensorboard(events, job) == expected
        assert in_mlflow(store, job) == expected
