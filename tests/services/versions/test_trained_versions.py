"""Trained versions: what `load`, `promote` and `remove` mean by a name, and that a number is never used twice."""

from __future__ import annotations

import pytest
from tests.helpers import fill, model, net, same, state, trainer
from torch import Tensor

from mongotorch import Datalayer, TorchModel
from mongotorch.errors import MongotorchError


def broken(output: Tensor, target: Tensor) -> Tensor:
    raise RuntimeError("no")


def test_after_a_failed_run_the_trained_version_is_loaded(db: Datalayer) -> None:
    select = fill(db)
    trained = db.apply(trainer(select)).result()
    failed = db.apply(trainer(select, objective=broken, model=model(seed=1)))
    assert failed.exception() is not None
    assert db.show("model", "m") == [0, 1, 2]

    loaded = db.load("model", "m")

    assert (loaded.version, loaded.uuid) == (1, trained.uuid)
    assert same(state(loaded), state(trained))
    assert db.load("model", "m", 2).version == 2


def test_without_a_trained_version_the_newest_is_loaded(db: Datalayer) -> None:
    db.apply(model())
    db.apply(model(seed=1))
    assert db.load("model", "m").version == 1


def test_a_version_says_whether_it_is_trained(db: Datalayer) -> None:
    db.apply(trainer(fill(db))).result()
    assert [db.show("model", "m", version)["trained"] for version in (0, 1)] == [False, True]
    assert [db.load("model", "m", version).trained for version in (0, 1)] == [False, True]
    assert not model().trained


def test_an_untrained_version_is_promoted_only_where_it_is_named(db: Datalayer) -> None:
    select = fill(db)
    first = db.apply(trainer(select)).result()
    assert db.apply(trainer(select, objective=broken, model=model(seed=1))).exception() is not None

    assert db.promote("model", "m").to_uuid == first.uuid
    assert db.promote("model", "m", 2).to_version == 2


@pytest.mark.parametrize("many", [1, 2])
def test_a_number_is_never_used_again(db: Datalayer, many: int) -> None:
    for seed in range(3):
        db.apply(model(seed=seed))
    for version in range(2, 2 - many, -1):
        db.remove("model", "m", version, force=True)

    db.apply(model(seed=7))

    assert db.show("model", "m") == [*range(3 - many), 3]
    with pytest.raises(MongotorchError):
        db.load("model", "m", 2)


def test_a_number_is_never_used_again_after_all_were_removed(db: Datalayer) -> None:
    db.apply(model())
    db.remove("model", "m", force=True)
    db.apply(TorchModel("m", object=net(3)))
    assert db.show("model", "m") == [1]
