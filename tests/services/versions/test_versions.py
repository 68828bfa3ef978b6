"""Versions: never one number for two, never another's weights, and none that another Python would crash on."""

from __future__ import annotations

import multiprocessing
import sys
from typing import Any

import pytest
import torch
from tests.helpers import fill, model, net, same, state, trainer
from torch import Tensor, nn

from mongotorch import Datalayer, Metric, TorchModel
from mongotorch.errors import NotFoundError, PythonVersionError

WRITERS = 8


def apply_one(uri: str, seed: int, barrier: Any, found: Any) -> None:
    """What each process does: the same identifier, weights of its own, at the same moment."""
    with Datalayer.connect(uri, progress=False) as db:
        applied = model(seed)
        barrier.wait(120)
        stored = db.apply(applied).result()
        found.put((seed, stored.version, stored.uuid))


def apply_run(uri: str, seed: int, barrier: Any, found: Any) -> None:
    """The same with a run each."""
    with Datalayer.connect(uri, progress=False) as db:
        applied = trainer(db["points"].find(), model=model(seed), max_iterations=2, seed=seed)
        barrier.wait(120)
        trained: Any = db.apply(applied).result()
        found.put((seed, trained.version, trained.uuid, float(trained.object[0].weight.detach().sum())))


def at_once(target: Any, uri: str) -> list[Any]:
    """What the processes found; they are forked from a server that has torch loaded and nothing open."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.services.versions.test_versions", "tests.run_processes"])
    barrier, found = context.Barrier(WRITERS), context.Queue()
    processes = [context.Process(target=target, args=(uri, seed, barrier, found)) for seed in range(WRITERS)]
    for process in processes:
        process.start()
    results = [found.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return sorted(results)


def test_processes_that_apply_one_identifier_at_once_get_a_version_each(server_uri: str) -> None:
    results = at_once(apply_one, server_uri)

    assert sorted(version for _, version, _ in results) == list(range(WRITERS))
    with Datalayer.connect(server_uri) as db:
        assert db.show("model", "m") == list(range(WRITERS))
        for seed, version, uuid in results:
            for loaded in (db.load(uuid=uuid), db.load("model", "m", version)):
                assert (loaded.version, loaded.uuid) == (version, uuid)
                assert same(state(loaded), state(net(seed)))


def test_processes_that_train_one_identifier_at_once_publish_a_version_each(server_uri: str) -> None:
    with Datalayer.connect(server_uri, valid_fraction=0.2) as db:
        fill(db)

        results = at_once(apply_run, server_uri)

        assert db.show("model", "m") == db.show("trainer", "t") == list(range(2 * WRITERS))
        assert len({version for _, version, _, _ in results}) == WRITERS
        for _, version, uuid, total in results:
            loaded: Any = db.load("model", "m", version)
            assert loaded.uuid == uuid
            assert float(loaded.object[0].weight.detach().sum()) == total
            assert loaded.trainer.model.uuid == uuid


unpickled: list[str] = []


def scale(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target)


class Telling:
    """An objective that tells when it is unpickled."""

    def __init__(self) -> None:
        self.scale: Any = lambda output, target: scale(output, target)  # bytecode, which pins the version

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        found: Tensor = self.scale(output, target)
        return found

    def __setstate__(self, state: dict[str, Any]) -> None:
        unpickled.append("objective")
        self.__dict__.update(state)


def test_bytecode_of_another_python_is_refused_before_it_is_unpickled(db: Datalayer) -> None:
    db.apply(trainer(fill(db), objective=Telling(), max_iterations=1))
    unpickled.clear()
    db.load("trainer", "t", 0)
    assert unpickled == ["objective"]
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    fields = db.show("trainer", "t", 0)["fields"]
    assert fields["objective"]["python"] == here

    db["mt.components"].raw.update_many({"type_id": "trainer"}, {"$set": {"fields.objective.python": "2.7"}})

    unpickled.clear()
    for version in (0, 1):
        with pytest.raises(PythonVersionError, match=rf"Python 2\.7.*Python {here}"):
            db.load("trainer", "t", version)
    with pytest.raises(PythonVersionError):
        db.load("model", "m", 1)  # which refers to it
    assert unpickled == []
    assert db.load("model", "m", 0).version == 0


class Local(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = net()
        self.then: Any = lambda output: output * 2

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.then(self.layer(x))
        return found


def test_a_model_with_bytecode_of_another_python_is_refused_too(db: Datalayer) -> None:
    db.apply(TorchModel("m", object=Local()))
    assert torch.equal(db.load("model", "m").predict([1.0] * 4), 2 * model().predict([1.0] * 4))

    db["mt.components"].raw.update_many({}, {"$set": {"fields.object.python": "3.99"}})

    with pytest.raises(PythonVersionError):
        db.load("model", "m")


def test_what_has_a_name_is_of_no_python_version(db: Datalayer) -> None:
    db.apply(Metric("scale", object=scale))

    record = db.show("metric", "scale", 0)["fields"]["object"]
    assert record == {"_codec": "name", "name": f"{__name__}.scale"}


def test_a_version_or_a_name_that_is_not_there_says_what_is(db: Datalayer) -> None:
    for seed in (0, 1):
        db.apply(model(seed))

    with pytest.raises(NotFoundError, match=r"version 2 of model 'm'; there are \[0, 1\]"):
        db.load("model", "m", 2)
    with pytest.raises(NotFoundError, match="'n'"):
        db.load("model", "n")
    with pytest.raises(NotFoundError, match="no-such-uuid"):
        db.load(uuid="no-such-uuid")
