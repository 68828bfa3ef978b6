"""What a run leaves in `mt.metrics`: means over intervals, few however long it is, the same after a kill."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any

import pytest
import torch
from tests.helpers import SELECT, fill, fit, model, trainer
from torch import Tensor

from mongotorch import Datalayer, TorchTrainer, Worker
from mongotorch.errors import NotFoundError, ParameterError, ServerUnavailableError
from mongotorch.jobs import RunMetrics
from mongotorch.services.training import observers
from mongotorch.services.training.observers import MetricRecorder, observe
from mongotorch.store import MetricEntry, MetricLog
from mongotorch.train import Stepped

JOB = {"_id": "j", "component": "c", "attempt": 1}


class Logged:
    """Keeps what a recorder writes; fails while it is told to."""

    def __init__(self) -> None:
        self.entries: dict[tuple[int, str], MetricEntry] = {}
        self.requests, self.fails = 0, False

    def write(self, measured: list[MetricEntry], **_: Any) -> bool:
        if self.fails:
            raise ServerUnavailableError("away")
        self.requests += 1
        self.entries |= {(one.step, one.kind): one for one in measured}
        return True

    def remove(self, job: str, *, after: int) -> int:
        self.entries = {key: one for key, one in self.entries.items() if key[0] <= after}
        return 0

    def thin(self, job: str, interval: int) -> int:
        self.entries = {k: one for k, one in self.entries.items() if k[1] != "train" or k[0] % interval == 0}
        return 0

    def of(self, kind: str) -> dict[int, MetricEntry]:
        return {step: one for (step, of), one in sorted(self.entries.items()) if of == kind}


def recorder(log: Any, **given: Any) -> MetricRecorder:
    return MetricRecorder(log, **{"job": JOB, "interval": 50, **given})


def stepped(step: int, loss: float = 1.0, rows: int = 8, **given: Any) -> Stepped:
    return Stepped(step=step, loss=torch.tensor(loss), rows=rows, **given)


losses: list[tuple[float, int]] = []


def kept(output: Tensor, target: Tensor) -> Tensor:
    """The objective; keeps that of each batch in training, and its rows."""
    loss = torch.nn.functional.cross_entropy(output, target)
    if loss.requires_grad:
        losses.append((float(loss.detach()), len(target)))
    return loss


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Telling(TorchTrainer):
    """Logs a value of each step, and the batch's own objective again."""

    def take_step(self, model: Any, batch: Any, optimizers: Any) -> Tensor:
        loss = super().take_step(model, batch, optimizers)
        self.log("again", loss)
        self.log("rows", len(batch[1]))
        return loss


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class WeightLogger(TorchTrainer):
    """Logs a weight itself."""

    def take_step(self, model: Any, batch: Any, optimizers: Any) -> Tensor:
        self.log("weight", model.object[0].weight[0, 0])
        return super().take_step(model, batch, optimizers)


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Slow(TorchTrainer):
    """Takes its time."""

    def take_step(self, model: Any, batch: Any, optimizers: Any) -> Tensor:
        time.sleep(0.2)
        return super().take_step(model, batch, optimizers)


def test_train_rows_are_means_over_rows(db: Datalayer) -> None:
    losses.clear()
    job = db.apply(trainer(fill(db), Telling, objective=kept, log_interval=5, loader_kwargs={"batch_size": 13}))
    job.result()

    metrics = db.metrics(job)
    found = [row for row in metrics if row.kind == "train"]
    assert [row.step for row in found] == [5, 10, 12]
    for row, (first, last) in zip(found, [(0, 5), (5, 10), (10, 12)], strict=True):
        part = losses[first:last]
        mean = sum(loss * rows for loss, rows in part) / sum(rows for _, rows in part)
        assert row.values["objective"] == pytest.approx(mean, rel=1e-6)
        assert row.values["again"] == pytest.approx(mean, rel=1e-6)
        assert row.values["learning_rate"] == 0.01
        assert row.values["samples_per_s"] > 0
        assert 0 <= row.values["waited_share"] <= 1
    assert metrics.interval == 5
    assert [step for step, kind, _, _ in metrics if kind == "valid"] == [4, 8, 12]


def test_without_an_interval_only_validations_are_kept(db: Datalayer) -> None:
    job = db.apply(trainer(fill(db), log_interval=None))
    assert {row.kind for row in job.metrics} == {"valid"}


@pytest.mark.parametrize("interval", [0, -1, 1.5, True, "50"])
def test_an_interval_is_a_whole_number(interval: Any) -> None:
    with pytest.raises(ParameterError, match="log_interval"):
        trainer(SELECT, log_interval=interval)


def test_a_run_of_ten_million_steps_keeps_some_thousand_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Logged()
    made = recorder(log, interval=1)
    steps, most = 0, 0
    for exponent in range(1, 15):  # only the steps at which a row is due: the others change nothing but means
        end = observers.MOST_ENTRIES * 2**exponent
        while steps < min(end, 10_000_000):
            steps = made._due
            made.on_step(stepped(steps))
            if len(made._waiting) > 100:
                made.flush()
        made.flush()
        most = max(most, len(log.of("train")))
    assert steps >= 10_000_000 - 2**13
    assert observers.MOST_ENTRIES / 2 <= len(log.of("train")) <= observers.MOST_ENTRIES
    assert most <= observers.MOST_ENTRIES + 100
    assert {step % 2**13 for step in log.of("train")} == {0}


@pytest.mark.parametrize("most", [2048, 8, 4, 3])
def test_what_goes_on_from_a_checkpoint_gives_the_same_rows(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(observers, "MOST_ENTRIES", most)
    given = [float(value) for value in torch.rand(500, generator=torch.Generator().manual_seed(3))]
    whole, resumed = Logged(), Logged()
    first = recorder(whole)
    for step, loss in enumerate(given, 1):
        first.on_step(stepped(step, loss, rows=step % 7 + 1))
    first.flush()

    begun = 0
    state: Any = None
    for begun_next in (130, 131, 150, 200, 333, 400, 500):
        part = recorder(resumed, begun=begun, state=state)
        for step in range(begun + 1, min(begun_next + 40, 500) + 1):  # 40 steps after the checkpoint it is killed
            part.on_step(stepped(step, given[step - 1], rows=step % 7 + 1))
            if step == begun_next:
                state = part.state_dict()
        part.flush()
        resumed.remove("j", after=begun_next)
        begun = begun_next
    values = [{step: one.values["objective"] for step, one in log.of("train").items()} for log in (whole, resumed)]
    assert values[0] == values[1]
    interval = {2048: 50, 8: 100, 4: 200, 3: 200}[most]
    assert list(values[0]) == list(range(interval, 501, interval))


def test_rows_after_the_checkpoint_of_a_killed_attempt_are_removed(db: Datalayer) -> None:
    log = MetricLog(db["x"].raw.database)
    job = db.apply(trainer(fill(db))).uuid
    for step in (5, 10, 15, 500):
        log.add(job=job, component="c", step=step, kind="train", values={"objective": 1.0})
    with recorder(log, job={**JOB, "_id": job, "attempt": 2}, begun=10):
        pass
    assert max(row.step for row in db.metrics(job)) == 10


def test_a_database_that_is_away_ends_no_run_and_loses_no_row(caplog: pytest.LogCaptureFixture) -> None:
    log = Logged()
    made = recorder(log, interval=1)
    log.fails = True
    for step in range(1, 11):
        made.on_step(stepped(step))
        made.flush()
    assert log.entries == {}
    assert [record.message for record in caplog.records] == ["job j: metrics could not be written: away"]
    log.fails = False
    made.flush()
    assert list(log.of("train")) == list(range(1, 11))


def test_many_rows_are_one_request() -> None:
    log = Logged()
    made = recorder(log, interval=1)
    with made:
        observe(fit(trainer(SELECT, max_iterations=200, validation_interval=None, log_interval=1)), [])
        for step in range(1, 2001):
            made.on_step(stepped(step))
        made.on_end()
    assert len(log.of("train")) == 2000
    assert log.requests <= 4


def test_a_logged_weight_is_that_of_its_step(db: Datalayer) -> None:
    job = db.apply(trainer(fill(db), WeightLogger, log_interval=1, max_iterations=3, validation_interval=None))
    steps, values = job.metrics.curve("weight")
    assert steps == [1, 2, 3]
    assert len(set(values)) == 3, "and not what it is when it is read"


def test_an_attempt_that_lost_its_job_writes_nothing(db: Datalayer) -> None:
    job = db.apply(trainer(fill(db), log_interval=5))
    before = db.metrics(job).rows
    log = MetricLog(db["x"].raw.database)
    assert not log.write([MetricEntry(step=99, kind="train", values={})], job=job.uuid, component="c", attempt=1)
    assert db.metrics(job).rows == before


def test_metrics_are_found_by_job_uuid_and_version(db: Datalayer) -> None:
    job = db.apply(trainer(fill(db), log_interval=5))
    trained = job.result()
    expected = db.metrics(job)
    versions: list[Any] = [("model", "m", 1), ("model", "m"), ("trainer", "t", 1)]
    found = [job.uuid, trained, trained.uuid, trained.trainer.uuid, *versions]
    assert [db.metrics(what) for what in found] == [expected] * len(found)
    assert job.metrics == expected
    for missing in ("nobody", ("model", "m", 0), ("model", "other", 1), ("model", "m", 7)):
        with pytest.raises(NotFoundError):
            db.metrics(missing)
    for wrong in (7, None, ("model",), {"$ne": 1}):
        with pytest.raises(ParameterError):
            db.metrics(wrong)  # type: ignore[arg-type]
    assert len(db.apply(model(identifier="alone")).metrics) == 0


def test_rows_are_shown_as_a_table(db: Datalayer) -> None:
    metrics = db.apply(trainer(fill(db), log_interval=1)).metrics
    text, page = repr(metrics), metrics._repr_html_()
    assert text.splitlines()[0].startswith(f"RunMetrics of job {metrics.job}: 15 rows, steps 1 to 12")
    assert "objective" in text
    assert len(text.splitlines()) == 13
    assert page.count("<tr>") == 12
    assert repr(RunMetrics(job="j", rows=())) == "RunMetrics of job j: no rows"


def test_a_frame_has_a_row_for_each_row(db: Datalayer) -> None:
    pandas = pytest.importorskip("pandas")
    metrics = db.apply(trainer(fill(db), log_interval=4)).metrics
    frame = metrics.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["step"]) == [row.step for row in metrics]
    assert list(frame.columns)[:3] == ["step", "kind", "time"]
    assert RunMetrics(job="j", rows=()).to_pandas().empty


def test_a_plot_has_a_curve_for_each_kind(db: Datalayer) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    metrics = db.apply(trainer(fill(db), log_interval=4)).metrics
    axes = metrics.plot()
    assert [line.get_label() for line in axes.lines] == ["train objective", "valid objective"]
    assert list(axes.lines[0].get_xdata()) == [4, 8, 12]
    assert metrics.plot("learning_rate", axes=axes) is axes
    assert len(axes.lines) == 3
    matplotlib.pyplot.close("all")


def test_rows_are_followed_until_the_run_has_ended(uri: str, db: Datalayer) -> None:
    select = fill(db)
    with Datalayer.connect(uri, compute="queue", progress=False) as other:
        job = db.job(other.apply(trainer(select, Slow, log_interval=1)).uuid)
    worker = threading.Thread(target=Worker(db).once)
    worker.start()
    seen = [(row.step, row.kind, job.done()) for row in db.metrics(job.uuid).follow()]
    worker.join()
    expected = db.metrics(job.uuid)
    assert sorted(row[:2] for row in seen) == [(row.step, row.kind) for row in expected]
    assert not seen[0][2], "the first rows came while it ran"
    assert list(expected.follow()) == []


def test_a_follower_that_stops_early_leaves_nothing_open(db: Datalayer) -> None:
    job = db.apply(trainer(fill(db), log_interval=1))
    rows = RunMetrics(job=job.uuid, rows=(), further=db.metrics(job).further).follow()
    assert next(rows).step == 1
    rows.close()  # type: ignore[attr-defined]


def test_a_run_that_is_handed_back_and_goes_on_has_the_rows_of_one_that_is_not(uri: str, db: Datalayer) -> None:
    applied = trainer(fill(db), Slow, log_interval=5, loader_kwargs={"batch_size": 7, "shuffle": True})
    with Datalayer.connect(uri, compute="queue", progress=False) as other:
        job = db.job(other.apply(applied).uuid)
    worker = Worker(db)
    run = threading.Thread(target=worker.once)
    run.start()
    while not job.progress.get("step"):
        time.sleep(0.05)
    worker.stop()
    run.join()
    assert job.status == "queued"
    assert Worker(db).once()
    plain = db.apply(trainer(db["points"].find(), log_interval=5, loader_kwargs=applied.loader_kwargs))

    def of(metrics: RunMetrics) -> list[Any]:
        return [(row.step, row.kind, row.values["objective"]) for row in metrics]

    assert of(job.metrics) == of(plain.metrics)


def test_progress_is_never_older_than_a_second(db: Datalayer, uri: str) -> None:
    seen = []
    run = threading.Thread(target=lambda: db.apply(trainer(fill(db), Slow, validation_interval=None)))
    run.start()
    with Datalayer.connect(uri, progress=False) as other:
        while run.is_alive():
            time.sleep(0.25)
            seen += [job.progress.get("step") for job in other.jobs(status="running")]
    run.join()
    assert len({step for step in seen if step}) >= 3
