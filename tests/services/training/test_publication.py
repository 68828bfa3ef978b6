"""What was trained is published: whatever its fields hold by then, and without what cannot be stored any more."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pymongo
import pytest
import torch
from tests.helpers import fill, model, same, state, trainer
from torch import Tensor

from mongotorch import Datalayer, Metric, Validation
from mongotorch.store.components import Components


def remembering() -> Callable[..., Any]:
    """A transform that opens a client when it is first called, and remembers all that it has seen."""
    memory: dict[Any, Any] = {}

    def transform(x: Any, y: Any) -> Any:
        if "client" not in memory:
            memory["client"] = pymongo.MongoClient(connect=False)
        memory[len(memory)] = "x" * 100_000
        return x, y

    return transform


def counting() -> Callable[..., float]:
    """A metric that remembers the same way."""
    memory: dict[Any, Any] = {}

    def metric(output: Tensor, target: Tensor) -> float:
        memory["client"] = pymongo.MongoClient(connect=False)
        return float((output.argmax(dim=1) == target).float().mean())

    return metric


class Odd(torch.optim.SGD):
    """Keeps what nobody can store."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["odd"] = (n for n in range(3))
        return loss


def stored_bytes(db: Datalayer) -> int:
    return sum(file["length"] for file in db["mt.artifacts.files"].raw.find())


@pytest.mark.filterwarnings("ignore:unclosed")
def test_fields_are_published_as_they_were_applied(db: Datalayer) -> None:
    select = fill(db)
    plain = db.apply(trainer(select)).result()
    validation = Validation("v", metrics=[Metric("share", object=counting())])
    applied = trainer(select, transform=remembering(), model=model(identifier="n", validation=validation))
    job = db.apply(applied.replace(identifier="u"))
    before = stored_bytes(db)

    trained = job.result()

    assert same(state(trained), state(plain))
    assert before < 1_000_000
    published = db.show("trainer", "u", 1)
    first = db.show("trainer", "u", 0)
    for field in ("transform", "objective", "key", "select"):
        assert published["fields"][field] == first["fields"][field], field
    assert set(first["blobs"]) & set(published["blobs"])
    assert db.show("model", "n", 1)["fields"]["validation"] == db.show("model", "n", 0)["fields"]["validation"]
    db.gc(grace_s=0.0)  # what the published versions name stays
    again: Any = db.load("trainer", "u", 1)
    assert again.transform(1, 2) == (1, 2)


@pytest.mark.filterwarnings("ignore:unclosed")
def test_what_was_published_is_recognised(db: Datalayer) -> None:
    applied = trainer(fill(db), transform=remembering())
    trained: Any = db.apply(applied).result()

    assert db.apply(db.load("trainer", "t")).result().version == trained.version
    assert db.apply(db.load("trainer", "t", 0)).result().version == trained.version
    assert db.apply(db.load("trainer", "t"), force=True).result().version == trained.version + 1


def test_a_state_that_cannot_be_stored_is_left_out_with_a_warning(
    db: Datalayer, caplog: pytest.LogCaptureFixture
) -> None:
    applied = trainer(
        fill(db), optimizer_cls=f"{__name__}:Odd", optimizer_kwargs={"lr": 0.01}, validation_interval=None
    )
    with caplog.at_level(logging.WARNING):
        trained = db.apply(applied).result()

    assert trained.version == 1
    assert db.load("trainer", "t").optimizer_state is None
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "optimizer_state" in record.getMessage()


def test_a_cancel_that_falls_into_the_publishing_write_comes_too_late(
    server_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert, answers, cancels = Components._insert_fenced, list[bool](), list[threading.Thread]()

    def cancelled_meanwhile(self: Components, documents: Any, attempt: int, session: Any) -> None:
        insert(self, documents, attempt, session)
        job = db.job(documents[-1]["job"])
        cancels.append(threading.Thread(target=lambda: answers.append(job.cancel())))
        cancels[-1].start()
        cancels[-1].join(0.5)  # it waits for the transaction, which goes on meanwhile

    with Datalayer.connect(server_uri, progress=False, compute="local") as db:
        select = fill(db)
        monkeypatch.setattr(Components, "_insert_fenced", cancelled_meanwhile)
        job = db.apply(trainer(select))
        assert job.result().version == 1
        for cancel in cancels:
            cancel.join()
        assert (answers, job.status) == ([False], "succeeded")
