"""What is stored of what is applied: every field, under its uuid, by the codec that was asked for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tests.helpers import fill, model, same, state, trainer

from mongotorch import Datalayer
from mongotorch.errors import ConflictError, NotFoundError


def test_a_uuid_stays_with_its_content(db: Datalayer) -> None:
    first = model(seed=0)
    db.apply(first)

    with pytest.raises(ConflictError, match="replace"):
        db.apply(model(seed=1, uuid=first.uuid))

    assert db.show("model", "m") == [0]
    with pytest.raises(NotFoundError):
        db.load("model", "m", 1)


def test_a_codec_can_be_chosen_for_a_field(db: Datalayer) -> None:
    applied = trainer(fill(db), max_iterations=1, artifacts={"loader_kwargs": "json", "objective": "dill"})

    trained = db.apply(applied).result()

    fields = db.show("trainer", "t", 1)["fields"]
    assert (fields["loader_kwargs"]["_codec"], fields["objective"]["_codec"]) == ("json", "dill")
    assert trained.trainer.loader_kwargs == {"batch_size": 16}


def test_the_generators_of_the_program_are_not_touched_and_the_seed_decides(db: Datalayer) -> None:
    select = fill(db)
    options = {"batch_size": 16, "shuffle": True}
    before = torch.get_rng_state()
    runs = [db.apply(trainer(select, seed=seed, loader_kwargs=options), force=True).result() for seed in (1, 1, 2)]

    assert torch.equal(torch.get_rng_state(), before)
    assert same(state(runs[0]), state(runs[1]))
    assert not same(state(runs[0]), state(runs[2]))


def test_all_fields_of_a_trainer_survive(db: Datalayer) -> None:
    select = fill(db).filter({"n": {"$lt": 100}}).sort("n", -1)
    applied = trainer(
        select,
        optimizer_kwargs={"lr": 0.01, "betas": (0.8, 0.99)},
        compute_kwargs={"device": "cpu", "num_workers": 0},
        metric_values={"objective": [1.5]},
        collate_fn=torch.utils.data.default_collate,
        transform=lambda x, y: (torch.tensor(x), y),
        seed=2**70,
        max_iterations=1,
    )

    db.apply(applied)

    stored: Any = db.load("trainer", "t", 0)
    for field in dataclasses.fields(applied):
        if field.name not in ("uuid", "db", "model", "transform"):
            assert getattr(stored, field.name) == getattr(applied, field.name), field.name
    assert stored.optimizer_kwargs["betas"] == (0.8, 0.99)
    assert same(stored.transform([1.0], 3), (torch.tensor([1.0]), 3))
    again: Any = db.load("trainer", "t", 1)
    assert again.metric_values["objective"][0] == 1.5
