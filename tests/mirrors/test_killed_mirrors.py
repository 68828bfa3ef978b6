"""Mirrors that are killed again and again during a run: each value is in their targets exactly once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.mirrors.mirrored import in_mlflow, in_tensorboard, torment, update

from mongotorch import Datalayer

pytestmark = pytest.mark.fault


def test_a_tensorboard_mirror_killed_twenty_times_during_a_run_writes_each_value_once(
    server_uri: str, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    to = f"tensorboard:{tmp_path}"
    with Datalayer.connect(server_uri, progress=False) as db:
        run = torment(server_uri, to, db, lambda: len(list(tmp_path.rglob("events.*"))), kills=20)
        update(server_uri, to)
        assert len(list(tmp_path.rglob("events.*"))) > 10
        assert in_tensorboard(tmp_path, run) == run.expected()


def size(folder: Path) -> int:
    """How many bytes the files below a folder have."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.timeout(900)
def test_an_mlflow_mirror_killed_during_a_run_writes_each_value_once(
    server_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store = f"file://{tmp_path / 'mlruns'}"
    to = f"mlflow:{store}"
    with Datalayer.connect(server_uri, progress=False) as db:
        run = torment(server_uri, to, db, lambda: size(tmp_path), kills=20)
        update(server_uri, to)
        assert in_mlflow(store, run) == run.expected()
