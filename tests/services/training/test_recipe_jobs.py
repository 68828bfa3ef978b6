"""Recipes in jobs: killed and resumed, published, continued, and with a transform of validations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from tests.helpers import COLLECTION, fill, same, state, trainer

from mongotorch import ByHash, Datalayer, Worker
from mongotorch.errors import DataError
from mongotorch.train import Fit, Stepped, Validated

RECIPE: dict[str, Any] = {
    "scheduler_cls": "SequentialLR",
    "scheduler_kwargs": {
        "schedulers": [
            {"cls": "LinearLR", "start_factor": 0.1, "total_iters": 4},
            {"cls": torch.optim.lr_scheduler.StepLR, "step_size": 3, "gamma": 0.5},
        ],
        "milestones": [4],
    },
    "optimizer_cls": torch.optim.AdamW,
    "param_groups": lambda _, parameter: {"weight_decay": 0.0} if parameter.ndim == 1 else {},
    "gradient_accumulation_steps": 2,
    "gradient_clip_norm": 0.5,
    "precision": "fp16",
    "ema_decay": 0.9,
    "max_iterations": 12,
}


class Counting:
    """Counts steps, and makes the rate smaller at each."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step(self, fit: Fit, event: Stepped) -> None:
        self.steps += 1
        fit.optimizers[0].param_groups[0]["lr"] *= 0.99

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


class Keeping(Counting):
    """Only counts."""

    def on_step(self, fit: Fit, event: Stepped) -> None:
        self.steps += 1


class Raising:
    """Fails at validations."""

    def on_validation(self, fit: Fit, event: Validated) -> None:
        raise ZeroDivisionError("no")


class Tolerated(Raising):
    """May do so."""

    may_fail = True


class Hearing:
    """Keeps what it was called for."""

    heard: ClassVar[list[str]] = []

    def on_start(self, fit: Fit) -> None:
        self.heard.append("on_start")

    def on_step(self, fit: Fit, event: Stepped) -> None:
        self.heard.append("on_step")

    def on_validation(self, fit: Fit, event: Validated) -> None:
        self.heard.append("on_validation")

    def on_checkpoint(self, fit: Fit) -> None:
        self.heard.append("on_checkpoint")

    def on_end(self, fit: Fit) -> None:
        self.heard.append("on_end")


class Dying(Counting):
    """Fails in its first attempt, after a validation, whose checkpoint is there then."""

    failed: ClassVar[list[int]] = []

    def on_step(self, fit: Fit, event: Stepped) -> None:
        super().on_step(fit, event)
        if event.step == 6 and not self.failed:
            self.failed.append(event.step)
            raise OSError("the disk is gone")  # an error after which a job is tried again


@pytest.fixture
def queue(uri: str) -> Iterator[Datalayer]:
    with Datalayer.connect(uri, compute="queue", valid_fraction=0.2, progress=False) as datalayer:
        yield datalayer


def test_a_job_that_fails_in_the_middle_ends_as_one_that_did_not(db: Datalayer, queue: Datalayer) -> None:
    select = fill(db)
    expected = db.apply(trainer(select, callbacks=[Counting()], **RECIPE)).result()

    Dying.failed.clear()
    job = queue.apply(trainer(select, callbacks=[Dying()], **RECIPE))
    Worker(queue).run(until_idle=True)
    found = job.result()

    assert Dying.failed == [6]
    assert same(state(found), state(expected))
    one, other = (version.trainer for version in (found, expected))
    assert same(one.optimizer_state, other.optimizer_state)
    for name in ("schedulers", "rates", "scaler"):
        assert same(one.training_state[name], other.training_state[name])
    assert one.training_state["callbacks"][0]["state"] == other.training_state["callbacks"][0]["state"]
    assert one.training_state["callbacks"][0]["state"] != {"steps": 0}


def test_a_published_trainer_goes_on_with_its_schedule(db: Datalayer) -> None:
    given: dict[str, Any] = {
        "scheduler_cls": "StepLR",
        "scheduler_kwargs": {"step_size": 8, "gamma": 0.5},
        "validation_interval": None,
    }
    first = db.apply(trainer(fill(db), callbacks=[Keeping()], **given)).result()
    rates = [group["lr"] for group in first.trainer.optimizer_state["param_groups"]]
    assert rates == [0.005]  # after 12 steps

    second = db.apply(db.load("model", "m").trainer, force=True).result()
    rates = [group["lr"] for group in second.trainer.optimizer_state["param_groups"]]
    assert rates == [0.01 * 0.5**3]  # after 24
    assert second.trainer.training_state["schedulers"][0]["last_epoch"] == 24
    assert second.trainer.training_state["callbacks"][0]["state"] == {"steps": 24}


WEIGHTED: dict[str, Any] = {
    "sample_weight": "w",
    "loader_kwargs": {"batch_size": 8, "shuffle": True},
    "max_epochs": 3,
    "max_iterations": 10**6,
    "validation_interval": "epoch",
    "scheduler_cls": "OneCycleLR",  # which refuses a step beyond those that it was made for
    "scheduler_kwargs": {"max_lr": 0.05, "total_steps": "max_iterations"},
    "gradient_accumulation_steps": 2,
}


@pytest.mark.parametrize("way", [{}, {"in_memory": False}, {"in_memory": False, "download": True}])
def test_weighted_documents_train_the_same_however_they_are_read_and_resumed(
    db: Datalayer, queue: Datalayer, way: dict[str, Any]
) -> None:
    select = fill(db)
    for n in range(5):
        members = [document["_id"] for document in db.execute(select) if document["_id"] % 5 == n]
        db[COLLECTION].update_many({"_id": {"$in": members}}, {"$set": {"w": [0, 0.3, 1, 1.5, 2][n]}})
    expected = db.apply(trainer(select, callbacks=[Counting()], **WEIGHTED)).result()
    Dying.failed.clear()
    job = queue.apply(trainer(select, callbacks=[Dying()], **WEIGHTED, **way))
    Worker(queue).run(until_idle=True)
    found = job.result()
    assert Dying.failed == [6]
    assert same(state(found), state(expected))
    assert found.trainer.training_state["callbacks"][0]["state"]["steps"] > 12

    plain = {name: value for name, value in WEIGHTED.items() if name != "sample_weight"}
    other = db.apply(trainer(select, **plain), force=True).result()
    records = (db["mt.components"].raw.find_one({"_id": version.uuid})["data"] for version in (expected, other))
    one, two = records
    assert one["train"]["count"] == two["train"]["count"]  # each document once
    assert one["valid"] == two["valid"]


@pytest.mark.parametrize("given", [{}, {"compute_kwargs": {"lanes": 4}}])
def test_a_schedule_over_weighted_documents_has_as_many_steps_as_the_run(
    db: Datalayer, given: dict[str, Any]
) -> None:
    select = fill(db)
    db[COLLECTION].update_many({}, {"$set": {"w": 1.5}})
    trained = db.apply(trainer(select, **{**WEIGHTED, "in_memory": False, **given})).result()
    (schedule,) = trained.trainer.training_state["schedulers"]
    assert schedule["last_epoch"] == schedule["total_steps"]
    db[COLLECTION].update_many({"_id": 3}, {"$set": {"w": "much"}})
    with pytest.raises(DataError, match="field 'w' of document 3"):
        db.check(trainer(select, split=ByHash(valid=0.01), **WEIGHTED))


def doubled(x: Any, y: Any) -> Any:
    """An augmentation that is easy to see."""
    return 2 * torch.tensor(x), y


def plain(x: Any, y: Any) -> Any:
    """None."""
    return torch.tensor(x), y


def test_validations_have_a_transform_of_their_own(db: Datalayer) -> None:
    select, measured = fill(db), []
    cases: list[dict[str, Any]] = [
        {"transform": doubled, "valid_transform": plain},
        {"transform": doubled},
        {"transform": plain},
    ]
    for given in cases:
        # The first step changes next to nothing.
        one = trainer(select, optimizer_kwargs={"lr": 1e-9}, max_iterations=1, **given)
        measured.append(db.apply(one, force=True).result().trainer.metric_values["objective"][0])
    assert measured[0] == pytest.approx(measured[2], abs=1e-6)
    assert measured[0] != pytest.approx(measured[1], abs=1e-3)


def test_a_trainer_without_a_recipe_is_stored_as_before(db: Datalayer) -> None:
    trained = db.apply(trainer(fill(db))).result()
    fields = db["mt.components"].raw.find_one({"_id": trained.trainer.uuid})["fields"]
    new = {"scheduler_cls", "param_groups", "precision", "ema_decay", "compile", "callbacks", "training_state"}
    assert not new & set(fields)


def test_an_error_of_a_callback_ends_the_run_and_names_it(db: Datalayer) -> None:
    job = db.apply(trainer(fill(db), callbacks=[Raising()]))
    error = job.exception()
    assert isinstance(error, ZeroDivisionError)
    assert "in on_validation of the callback Raising" in error.__notes__
    assert db.show("model", "m") == [0]


def test_a_callback_that_may_fail_is_logged(db: Datalayer, caplog: pytest.LogCaptureFixture) -> None:
    job = db.apply(trainer(fill(db), callbacks=[Tolerated()]))
    assert job.result().version == 1
    assert "the callback Tolerated failed in on_validation" in caplog.text


def test_a_callback_hears_of_everything_in_order(db: Datalayer) -> None:
    Hearing.heard.clear()
    db.apply(trainer(fill(db), callbacks=[Hearing()], max_iterations=4, validation_interval=2)).result()
    names = [name for name in Hearing.heard if name != "on_checkpoint"]
    two = ["on_step", "on_step", "on_validation"]
    assert names == ["on_start", *two, *two, "on_end"]
    assert "on_checkpoint" in Hearing.heard
