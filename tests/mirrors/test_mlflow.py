"""What MLflow's own client finds: each value of a run under its name and step, exactly once, and how it ended."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
from tests.helpers import fill, trainer
from tests.mirrors.mirrored import Written, in_mlflow, mlflow_runs, update

from mongotorch import Datalayer
from mongotorch.errors import SettingError
from mongotorch.mirrors import open_mirror

pytest.importorskip("mlflow")
pytest.importorskip("alembic")
from mlflow import MlflowClient

# Of SQLAlchemy, about what MLflow asks it for.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``")


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store, whose tables take MLflow seconds to make."""
    path = tmp_path_factory.mktemp("mlflow") / "runs.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments(max_results=1)
    return path


@pytest.fixture
def store(empty_store: Path, tmp_path: Path) -> str:
    """The address of an empty store."""
    return f"sqlite:///{shutil.copy(empty_store, tmp_path / 'runs.db')}"


def test_a_run_is_mirrored_with_parameters_and_its_end(db: Datalayer, uri: str, store: str) -> None:
    job = db.apply(trainer(fill(db), log_interval=4))
    assert update(uri, f"mlflow:{store}") == 6
    assert update(uri, f"mlflow:{store}") == 0

    (run,) = mlflow_runs(store)
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer_cls"] == "Adam"
    assert run.data.metrics["train/objective"] == pytest.approx(db.metrics(job).curve()[1][-1])


def test_it_goes_on_where_the_histories_end(db: Datalayer, uri: str, store: str) -> None:
    run, to = Written(db), f"mlflow:{store}"
    run.measure(1, 2, 3, more={"what? ever": 1.0})
    assert update(uri, to) == 3
    run.measure(2, 3, 4, more={"what? ever": 1.0})
    assert update(uri, to) == 1
    run.measure(4, kind="valid")
    run.fail()
    assert update(uri, to) == 1
    assert update(uri, to) == 0
    assert in_mlflow(store, run) == Counter(
        {(tag.replace("?", "_"), step): n for (tag, step), n in run.expected().items()}
    )
    assert mlflow_runs(store)[0].info.status == "FAILED"


def test_a_thousand_values_and_more_are_logged(db: Datalayer, uri: str, store: str) -> None:
    run = Written(db)
    run.measure(*range(1, 701))
    assert update(uri, f"mlflow:{store}") == 700
    assert in_mlflow(store, run) == run.expected()


def test_a_store_that_cannot_be_used_is_refused(db: Datalayer) -> None:
    with pytest.raises(SettingError, match="mlflow") as caught:
        open_mirror("mlflow:nosuch://me:secret@host/x", db)
    assert "secret" not in str(caught.value)


def test_a_parameter_that_was_half_written_does_not_keep_values_back(
    db: Datalayer, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a store of files, which MLflow still has where one asks for it."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run, store = Written(db), f"file://{tmp_path / 'mlruns'}"
    run.measure(1)
    update(uri, f"mlflow:{store}")
    (kept,) = (tmp_path / "mlruns").rglob("params/max_iterations")
    kept.write_text("")
    run.measure(2)
    assert update(uri, f"mlflow:{store}") == 1
    assert in_mlflow(store, run) == run.expected()
