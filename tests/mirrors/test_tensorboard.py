"""What TensorBoard's own reader finds: each value of a run under its tag and step, exactly once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.helpers import fill, trainer
from tests.mirrors.mirrored import Written, half_write, in_tensorboard, update

from mongotorch import Datalayer
from mongotorch.errors import SettingError
from mongotorch.mirrors import open_mirror

pytest.importorskip("tensorboard")


def test_a_run_is_mirrored_with_its_values(db: Datalayer, tmp_path: Path) -> None:
    job = db.apply(trainer(fill(db), log_interval=4))
    with open_mirror(f"tensorboard:{tmp_path}", db) as target:
        assert target.update(db) == 6
        assert target.update(db) == 0

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(tmp_path / "t" / job.uuid)).Reload()
    steps, values = db.metrics(job).curve("objective", "train")
    found = reader.Scalars("train/objective")
    assert [one.step for one in found] == steps
    assert [one.value for one in found] == pytest.approx(values, rel=1e-6)
    assert abs(found[0].wall_time - job.record["started"].timestamp()) < 24 * 3600
    assert len(reader.Scalars("valid/objective")) == 3


def test_it_goes_on_where_the_files_end(db: Datalayer, uri: str, tmp_path: Path) -> None:
    run, to = Written(db), f"tensorboard:{tmp_path}"
    run.measure(1, 2, 3)
    assert update(uri, to) == 3
    run.measure(4)
    run.measure(2, 3)  # a run that goes on from an earlier checkpoint
    assert update(uri, to) == 1
    run.measure(4, kind="valid")
    assert update(uri, to) == 1
    assert update(uri, to) == 0
    assert in_tensorboard(tmp_path, run) == run.expected()


def test_a_half_written_record_is_written_again(db: Datalayer, uri: str, tmp_path: Path) -> None:
    run, to = Written(db), f"tensorboard:{tmp_path}"
    for end in (3, 6, 9):
        run.measure(*range(end - 2, end + 1))
        update(uri, to)
        half_write(tmp_path)
    assert update(uri, to) == 1
    assert in_tensorboard(tmp_path, run) == run.expected()


def test_a_run_that_has_ended_is_read_once_and_opened_again_if_it_runs_again(
    db: Datalayer, uri: str, tmp_path: Path
) -> None:
    run, to = Written(db), f"tensorboard:{tmp_path}"
    run.measure(1)
    run.fail()
    assert update(uri, to) == 1
    assert update(uri, to) == 0
    assert run.jobs.requeue(run.uuid)
    run.claim()
    run.measure(1, 2)
    assert update(uri, to) == 1
    run.measure(3)
    run.fail()
    assert update(uri, to) == 1
    assert in_tensorboard(tmp_path, run) == run.expected()


def test_an_open_mirror_sees_new_runs_and_late_rows(db: Datalayer, tmp_path: Path) -> None:
    first = Written(db, "first")
    with open_mirror(f"tensorboard:{tmp_path}", db) as target:
        for step in range(1, 4):
            first.measure(step)
            assert target.update(db) == 1
        second = Written(db, "second")
        second.measure(1)
        second.fail()
        first.measure(4)
        first.fail()
        assert target.update(db) == 2
        assert target.update(db) == 0
    assert in_tensorboard(tmp_path, first, "first") == first.expected()
    assert in_tensorboard(tmp_path, second, "second") == second.expected()


def test_a_second_mirror_is_kept_out(db: Datalayer, tmp_path: Path) -> None:
    with (
        open_mirror(f"tensorboard:{tmp_path}", db),
        pytest.raises(SettingError, match="another mirror"),
    ):
        open_mirror(f"tensorboard:{tmp_path}", db)
    open_mirror(f"tensorboard:{tmp_path}", db).close()


def test_a_folder_that_cannot_be_written_is_refused(db: Datalayer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingError, match="no folder to write to"):
        open_mirror(f"tensorboard:{tmp_path / 'file'}", db)


def test_a_job_that_is_removed_or_broken_does_not_end_the_mirror(
    db: Datalayer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, gone, good = Written(db, "broken"), Written(db, "gone"), Written(db, "good")
    good.measure(1)
    db["mt.jobs"].raw.update_one({"_id": broken.uuid}, {"$unset": {"type_id": ""}})
    with open_mirror(f"tensorboard:{tmp_path}", db) as target:
        listed = db.run_log.changed_jobs(None)
        db["mt.jobs"].raw.delete_one({"_id": gone.uuid})
        monkeypatch.setattr(type(db.run_log), "changed_jobs", lambda *_: listed)
        assert target.update(db) == 1


def test_a_target_that_fails_is_asked_again_what_it_has(db: Datalayer, tmp_path: Path) -> None:
    run = Written(db)
    run.measure(1)
    with open_mirror(f"tensorboard:{tmp_path}", db) as target:
        target.update(db)
        with pytest.MonkeyPatch.context() as patch:

            def half(self: Any, moment: Any, rows: Any) -> None:
                write(self, moment, rows[:2])
                raise OSError("no space left")

            write = type(target).write  # type: ignore[attr-defined]
            patch.setattr(type(target), "write", half)
            run.measure(2, 3, 4)
            assert target.update(db) == 0
        assert target.update(db) == 1
    assert in_tensorboard(tmp_path, run) == run.expected()
