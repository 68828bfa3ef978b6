"""The main job: apply, train out of the database, publish, and load again."""

from __future__ import annotations

from typing import Any

import pytest
from tests.helpers import documents_in, fill, model, net, same, state, trainer
from torch import Tensor

from mongotorch import Datalayer, Dataset, Metric, TorchModel, TorchTrainer, Validation
from mongotorch.errors import CodecError, ParameterError

worsening = iter(float(n) for n in range(10**6))


def worse(output: Tensor, target: Tensor) -> Tensor:
    """An objective that never gets better, so that a run without a limit ends."""
    return output.sum() * 0 + next(worsening)


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(dim=1) == target).float().mean()


def test_a_default_trainer_is_stored_comes_back_equal_and_stops_early(db: Datalayer) -> None:
    plain = TorchTrainer("plain", key=("x", "y"), select=fill(db), objective=worse, model=model())

    job = db.apply(plain)

    stored = db.load("trainer", "plain", 0)
    assert stored == plain
    assert stored.uuid == plain.uuid
    assert (stored.max_iterations, type(stored.max_iterations)) == (10**100, int)
    document = db.show("model", "m", job.result().version)
    assert (document["steps"], document["best_step"]) == (600, 100)
    published = db.load("trainer", "plain", 1)
    assert published.max_iterations == 10**100
    grown = {"optimizer_state": None, "metric_values": None, "model": plain.model}
    assert published.replace(**grown) == plain


def test_a_run_makes_exactly_so_many_steps_and_publishes_what_it_trained(db: Datalayer) -> None:
    mine = net()
    applied = trainer(fill(db), max_iterations=5, validation_interval=100, model=TorchModel("m", object=mine))

    job = db.apply(applied)
    trained = job.result()

    assert (trained.version, trained.identifier) == (1, "m")
    assert db.show() == ["model", "trainer"]
    assert db.show("model", "m") == db.show("trainer", "t") == [0, 1]
    assert (db.show("model", "m", 1)["steps"], job.progress["step"]) == (5, 5)
    kept: Any = db.load("trainer", "t")
    assert [float(one["step"]) for one in kept.optimizer_state["state"].values()] == [5.0] * 4
    assert {name: len(values) for name, values in kept.metric_values.items()} == {"objective": 1}
    for loaded in (db.load("model", "m"), db.load("model", "m", 1), db.load(uuid=trained.uuid), kept.model):
        assert same(state(loaded), state(trained))
        assert (loaded.uuid, loaded.version) == (trained.uuid, 1)
    assert not same(state(trained), state(net()))
    assert trained.trainer.model is trained
    assert not trained.object.training
    # What the program holds, and what was stored before, is as it was.
    assert same(state(mine), state(net()))
    assert same(state(db.load("model", "m", 0)), state(net()))
    assert same(state(job.component.model), state(net()))


def test_the_model_learns_and_its_predictions_can_be_used(db: Datalayer) -> None:
    select = fill(db)
    checked = model(
        postprocess=lambda output: int(output.argmax()),
        validation=Validation("v", metrics=[Metric("accuracy.top-1", object=accuracy)]),
    )

    trained = db.apply(
        trainer(
            select,
            max_iterations=80,
            model=checked,
            loader_kwargs={"batch_size": 16, "shuffle": True},
            listen="accuracy.top-1",
        )
    ).result()

    valid = list(db.execute(select.fold("valid")))
    found = trained.predict_batches([document["x"] for document in valid])
    share = sum(one == document["y"] for one, document in zip(found, valid, strict=True)) / len(valid)
    assert share > 0.9
    assert max(trained.trainer.metric_values["accuracy.top-1"]) == pytest.approx(share)


def test_applying_from_the_models_side_trains_the_same(db: Datalayer) -> None:
    select = fill(db)
    one = db.apply(trainer(select)).result()

    other = db.apply(model(identifier="side", trainer=trainer(select, model=None))).result()

    assert (other.identifier, other.version, other.trainer.version) == ("side", 1, 3)
    assert same(state(one), state(other))
    assert other.trainer.model is other
    assert same(other.trainer.optimizer_state, one.trainer.optimizer_state)
    assert same(other.trainer.metric_values, one.trainer.metric_values)


def test_a_component_that_was_given_its_db_applies_itself(db: Datalayer) -> None:
    trained = trainer(fill(db), db=db, max_iterations=1).apply().result()

    assert db.load("model", "m").uuid == trained.uuid
    assert trained.trainer.db is None


def test_the_same_content_is_neither_stored_nor_trained_again(db: Datalayer) -> None:
    select = fill(db)
    applied = trainer(select)
    first = db.apply(applied).result()
    before = documents_in(db)

    results = [
        db.apply(applied).result(),
        db.apply(trainer(select)).result(),
        db.apply(db.load("trainer", "t")).result(),
        db.apply(db.load("model", "m")).result(),
        db.apply(db.load("trainer", "t", 0)).result(),
    ]

    assert {found.uuid for found in results} == {first.uuid}
    assert documents_in(db) == before


def test_the_same_content_from_the_models_side_is_recognised_too(db: Datalayer) -> None:
    select = fill(db)
    first = db.apply(model(trainer=trainer(select, model=None))).result()
    before = documents_in(db)

    again = db.apply(model(trainer=trainer(select, model=None))).result()

    assert again.uuid == first.uuid
    assert documents_in(db) == before


def test_force_trains_the_same_content_again_as_a_version_of_its_own(db: Datalayer) -> None:
    applied = trainer(fill(db))
    first = db.apply(applied).result()

    second = db.apply(applied, force=True).result()
    third = db.apply(applied, force=True).result()

    assert db.show("model", "m") == [0, 1, 2, 3]
    assert len({first.uuid, second.uuid, third.uuid}) == 3
    assert same(state(first), state(second))
    assert same(state(first), state(third))
    assert len(db.jobs()) == 3


def test_a_second_run_goes_on_where_the_first_one_ended(db: Datalayer) -> None:
    select = fill(db)
    first = db.apply(trainer(select, max_iterations=6, validation_interval=3)).result()

    second = db.apply(first.trainer.replace(max_iterations=4, validation_interval=2)).result()
    third = db.apply(second.trainer, force=True).result()

    steps = [
        {float(one["step"]) for one in run.trainer.optimizer_state["state"].values()}
        for run in (first, second, third)
    ]
    best = [db.show("model", "m", run.version)["best_step"] for run in (first, second, third)]
    assert steps == [{best[0]}, {best[0] + best[1]}, {best[0] + best[1] + best[2]}]
    values = [run.trainer.metric_values["objective"] for run in (first, second, third)]
    assert [len(found) for found in values] == [2, 4, 6]
    assert (values[1][:2], values[2][:4]) == (values[0], values[1])
    assert db.show("model", "m") == [0, 1, 2, 3]


def test_other_components_are_stored_with_what_they_refer_to(db: Datalayer) -> None:
    validation = Validation(
        "v",
        metrics=[Metric("accuracy", object=accuracy)],
        datasets=[Dataset("hard", select=db["hard"].find({"n": 1}))],
    )

    job = db.apply(validation)

    assert (job.done(), job.status, job.exception(), job.cancel()) == (True, "succeeded", None, False)
    assert job.result() == validation == db.load("validation", "v")
    assert db.show() == ["dataset", "metric", "validation"]
    assert db.load("metric", "accuracy").object is accuracy
    assert db.load("dataset", "hard").select == db["hard"].find({"n": 1})
    assert db.jobs() == []


def test_a_model_without_a_trainer_is_stored_as_it_is(db: Datalayer) -> None:
    stored = db.apply(model()).result()

    assert (stored.version, same(state(stored), state(net()))) == (0, True)
    assert db.apply(model()).result().uuid == stored.uuid
    assert db.apply(model(seed=1)).result().version == 1
    assert same(state(db.load("model", "m", 0)), state(net()))


def test_what_cannot_be_applied_leaves_nothing(db: Datalayer) -> None:
    select = fill(db)
    wrong: list[tuple[Any, type[Exception], str]] = [
        (trainer(select, model=None), ParameterError, "model"),
        (trainer(select, artifacts={"objective": "zip"}), CodecError, "objective"),
        (model(trainer=trainer(select, model=None, listen="accuracy")), ParameterError, "listen"),
    ]
    for component, error, field in wrong:
        with pytest.raises(error) as caught:
            db.apply(component)
        assert getattr(caught.value, "field", None) == field
    assert documents_in(db) == {}
