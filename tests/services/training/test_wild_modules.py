"""Modules of the wild: applied, trained two steps, published, and loaded in another process with equal outputs.

What cannot be is refused by `apply` with the reason, before the first step.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import wild_modules
from tests.helpers import documents_in, fill, trainer
from tests.wild_modules import ODD, WILD, made, scores

from mongotorch import Datalayer, Query, TorchModel, TorchTrainer
from mongotorch.errors import CodecError, ParameterError
from mongotorch.services.versions.catalog import Catalog

pytestmark = pytest.mark.filterwarnings("ignore")

X = torch.linspace(-2, 2, 64).reshape(16, 4)
# Adam divides by what 16 bits cannot hold.
OPTIMIZERS: dict[str, dict[str, Any]] = {"float16": {"optimizer_cls": "SGD"}}
ELSEWHERE = """
import sys, torch
from mongotorch import Datalayer
uri, into, count = sys.argv[1:]
from tests.services.training.test_wild_modules import output_of
with Datalayer.connect(uri) as db:
    torch.save({n: output_of(db.load("model", f"m{n}").object) for n in range(int(count))}, into)
"""


def output_of(module: Any) -> Any:
    with torch.no_grad():
        return scores(module(X))


def applied(select: Query, name: str, number: int) -> TorchTrainer:
    made_of: TorchTrainer = trainer(
        select,
        objective=wild_modules.cross_entropy,
        max_iterations=2,
        validation_interval=2,
        loader_kwargs={"batch_size": 32},
        model=TorchModel(f"m{number}", object=made(name)),
        **OPTIMIZERS.get(name, {}),
    )
    return made_of.replace(identifier=f"t{number}")


def test_modules_of_the_wild_are_the_same_in_another_process(
    server_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(WILD) >= 45
    trained: dict[str, Any] = {}
    publish = Catalog.publish

    def publishing(self: Catalog, root: Any, **given: Any) -> Any:
        published = publish(self, root, **given)
        trained[root.identifier] = output_of(root.object)
        return published

    monkeypatch.setattr(Catalog, "publish", publishing)
    failed: list[str] = []
    with Datalayer.connect(server_uri, progress=False) as db:
        select = fill(db)
        for number, name in enumerate(WILD):
            job = db.apply(applied(select, name, number))
            if (error := job.exception()) is not None:
                failed.append(f"{name}: {type(error).__name__}: {error}")
        assert failed == []
        assert db.verify().problems == ()

    into = tmp_path / "outputs"
    command = [sys.executable, "-W", "ignore", "-c", ELSEWHERE, server_uri, str(into), str(len(WILD))]
    environment = {**os.environ, "MONGOTORCH_PROGRESS": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    loaded = torch.load(into)
    different = [name for n, name in enumerate(WILD) if not torch.equal(loaded[n], trained[f"m{n}"])]
    assert different == []


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("meta device", r"0\.weight is on the meta device.*to_empty"),
        ("partly on the meta device", r"2\.weight is on the meta device"),
        ("weak references", "KeyedRef"),
        ("scripted", "cannot be pickled"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_apply(db: Datalayer, name: str, why: str) -> None:
    select = fill(db)
    with pytest.raises(CodecError, match=why):
        db.apply(applied(select, name, 0))
    assert documents_in(db) == {}


def test_what_does_not_take_its_state_back_is_refused_before_the_first_step(
    db: Datalayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    monkeypatch.setattr(TorchTrainer, "take_step", lambda *_: steps.append(1))
    job = db.apply(applied(fill(db), "nested", 0))
    with pytest.raises(ParameterError, match="state_dict") as error:
        job.result()
    assert error.value.field == "object"
    assert steps == []


def test_every_odd_module_has_a_test() -> None:
    assert set(ODD) == {"meta device", "partly on the meta device", "weak references", "scripted", "nested"}


def test_what_somebody_set_on_a_parameter_is_stored(db: Datalayer) -> None:
    first: Any = wild_modules.small()
    first[0].weight.decay = 0.5
    first[0].weight.groups = {"a": [1, 2]}
    stored: Any = db.apply(TorchModel("m", object=first)).result().object
    assert (stored[0].weight.decay, stored[0].weight.groups) == (0.5, {"a": [1, 2]})
    assert isinstance(stored[0].weight, torch.nn.Parameter)
    assert torch.equal(stored[0].weight, first[0].weight)
    assert not vars(stored[2].weight)
    again: Any = db.load("model", "m").object
    assert again[0].weight.decay == 0.5
    assert db.apply(TorchModel("m", object=first)).result().version == 0
