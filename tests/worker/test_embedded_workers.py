"""Workers over an embedded server: its password reaches every process that needs it, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers import fill, trainer

from mongotorch import Datalayer
from mongotorch.mongo.embedded_server import wait_for
from mongotorch.worker import Supervisor


def test_jobs_run_in_processes_that_share_the_server(tmp_path: Path) -> None:
    folder = tmp_path / "db"
    given: dict[str, Any] = {"progress": False, "valid_fraction": 0.2, "cache_dir": tmp_path / "cache"}
    with Datalayer.connect(f"embedded:{folder}", compute="queue", **given) as db:
        loader = {"batch_size": 16, "num_workers": 1}
        job = db.apply(trainer(fill(db), loader_kwargs=loader))
        tally = Supervisor(db).run("until_idle")
        assert (tally.done, tally.failed) == (1, 0), job.record.get("error")
        assert db.load("model", "m").version == 1
    wait_for(folder / "keeper.lock")
