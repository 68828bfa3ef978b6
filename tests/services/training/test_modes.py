"""However the documents are read: the same ones, once an epoch, in the same order, to the same weights."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tests.helpers import COLLECTION, Recorder, fill, fold_ids, net, number_of, same, state, trainer
from torch import Tensor, nn

from mongotorch import Datalayer, TorchModel, TorchTrainer

WAYS: dict[str, dict[str, Any]] = {
    "memory": {},
    "memory and workers": {"loader_kwargs": {"num_workers": 2}},
    "streamed": {"in_memory": False},
    "prefetched": {"in_memory": False, "data_prefetch": True},
    "download": {"in_memory": False, "download": True},
    "workers of the loader": {"in_memory": False, "data_prefetch": True, "loader_kwargs": {"num_workers": 2}},
    "workers of the engine": {
        "in_memory": False,
        "loader_kwargs": {"persistent_workers": True, "prefetch_factor": 1},
        "compute_kwargs": {"num_workers": 2},
    },
}
BATCH, EPOCHS = 10, 3


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class WithProcess(Recorder):
    """Keeps in which processes the samples were made, too."""

    processes: ClassVar[set[int]] = set()

    def take_step(self, model: TorchModel, batch: Any, optimizers: Any) -> Tensor:
        x, process, n = batch
        self.processes.update(process.tolist())
        return super().take_step(model, (x, n), optimizers)

    def forward(self, model: TorchModel, batch: Any) -> Any:
        return super().forward(model, (batch[0], batch[-1]))


def moved(x: list[float], n: int) -> tuple[Tensor, int, int]:
    return torch.tensor(x) + n / 100, os.getpid(), n


def run(
    db: Datalayer, way: str, *, shuffle: bool, cls: type[TorchTrainer] = Recorder, **given: Any
) -> tuple[TorchModel, list[int]]:
    """A run of three epochs; the model, and the documents of its steps in order."""
    epoch = -(-len(fold_ids(db, "train")) // BATCH)
    usual: dict[str, Any] = {
        "key": ("x", "n"),
        "objective": number_of,
        "max_iterations": EPOCHS * epoch,
        "validation_interval": epoch,
        "seed": 2,
        "prefetch_size": 25,
        "prefetch_factor": 2,
        "loader_kwargs": {"batch_size": BATCH, "shuffle": shuffle, **WAYS[way].get("loader_kwargs", {})},
    }
    rest = {name: value for name, value in WAYS[way].items() if name != "loader_kwargs"}
    Recorder.steps.clear()
    trained = db.apply(trainer(db[COLLECTION].find(), cls, **{**usual, **rest, **given}), force=True).result()
    return trained, [n for step in Recorder.steps for n in step]


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_way_trains_on_the_same_documents_to_the_same_weights(db: Datalayer, shuffle: bool) -> None:
    fill(db)
    train = fold_ids(db, "train")
    model, first = run(db, "memory", shuffle=shuffle)

    epochs = [first[n : n + len(train)] for n in range(0, len(first), len(train))]
    assert len(epochs) == EPOCHS
    assert all(sorted(epoch) == train for epoch in epochs)
    assert (epochs[0] == train, epochs[0] == epochs[1]) == ((False, False) if shuffle else (True, True))
    for way in set(WAYS) - {"memory"}:
        other, order = run(db, way, shuffle=shuffle)
        assert order == first, way
        assert same(state(other), state(model)), way
        assert same(other.trainer.metric_values, model.trainer.metric_values), way


def test_every_way_transforms_the_same_documents_and_workers_do_it_elsewhere(db: Datalayer) -> None:
    fill(db)
    outcomes = {}
    for way in WAYS:
        WithProcess.processes.clear()
        model, order = run(db, way, shuffle=True, cls=WithProcess, transform=moved)
        outcomes[way] = (state(model), order)
        here = WithProcess.processes == {os.getpid()}
        assert here is ("workers" not in way), way
        assert ("workers" in way) is (os.getpid() not in WithProcess.processes), way

    for way, outcome in outcomes.items():
        assert same(outcome, outcomes["memory"]), way
    plain, _ = run(db, "memory", shuffle=True)
    assert not same(state(plain), outcomes["memory"][0])


def test_a_download_is_read_once_for_all_epochs_and_runs(db: Datalayer, tmp_path: Path) -> None:
    fill(db)
    run(db, "download", shuffle=True)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}

    run(db, "download", shuffle=True)

    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert before
    assert {path: time for path, time in after.items() if "lock" not in path.name} == {
        path: time for path, time in before.items() if "lock" not in path.name
    }


def test_batches_that_are_not_full_can_be_dropped(db: Datalayer) -> None:
    fill(db)
    full = len(fold_ids(db, "train")) // BATCH * BATCH

    options = {"batch_size": BATCH, "drop_last": True}
    run(db, "streamed", shuffle=False, loader_kwargs=options)

    assert {len(step) for step in Recorder.steps} == {BATCH}
    assert len({n for step in Recorder.steps for n in step}) == full


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Dropout(0.2), net())

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layers(x + torch.rand_like(x) / 10)
        return output


@pytest.mark.parametrize("way", ["prefetched", "workers of the loader", "download"])
def test_threads_and_workers_do_not_draw_from_the_generator_of_the_run(db: Datalayer, way: str) -> None:
    fill(db)
    found = [state(run(db, w, shuffle=True, model=TorchModel("m", object=Noisy()))[0]) for w in ("memory", way)]

    assert same(*found)
