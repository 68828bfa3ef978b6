"""The stream goes on where it stopped in the loops of others: torchdata's loader, Lightning, transformers."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mongotorch import Datalayer
from mongotorch.data import Stream

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker"),  # on two cores
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata does
]
MONGOD = pytest.mark.parametrize("uri", ["mongod"], indirect=True)  # on mongomock test_loaders.py has them all
WORKERS = pytest.mark.parametrize(("workers", "persistent"), [(0, False), (1, True), (2, False), (4, True)])
COUNT = 200


@pytest.fixture(autouse=True)
def documents(db: Datalayer) -> None:
    db["documents"].insert_many([{"_id": n, "n": n, "x": [float(n), 1.0]} for n in range(COUNT)])


def stream(db: Datalayer, batch_size: int = 16) -> Stream:
    sizes: dict[str, Any] = {"prefetch_size": 20, "prefetch_factor": 4}
    query = db["documents"].find()
    return db.stream(query, key=("x", "n"), batch_size=batch_size, shuffle=True, seed=5, **sizes)


def epochs_of(db: Datalayer, count: int, batch_size: int = 16) -> list[list[list[int]]]:
    with stream(db, batch_size) as alone:
        return [rows(alone) for _ in range(count)]


def rows(batches: Any) -> list[list[int]]:
    return [n.tolist() for _, n in batches]


@MONGOD
@WORKERS
@pytest.mark.parametrize("batch_size", [16, 20])
def test_a_stateful_loader_goes_on_at_any_batch(
    db: Datalayer, workers: int, persistent: bool, batch_size: int
) -> None:
    """Each row exactly once, also where the last batch is full, and with the random numbers of the run before."""
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    epochs = epochs_of(db, 3, batch_size)

    def loader() -> Any:
        torch.manual_seed(3)
        return torchdata.StatefulDataLoader(
            stream(db, batch_size), batch_size=None, num_workers=workers, persistent_workers=persistent
        )

    running = loader()
    states = [running.state_dict()]
    for epoch in epochs[:2]:
        for batch, expected in zip(running, epoch, strict=True):
            assert batch[1].tolist() == expected
            states.append(running.state_dict())
    served, length = epochs[0] + epochs[1], len(epochs[0])
    for at in (0, 3, length - 1, length + 2):
        resumed = loader()
        resumed.load_state_dict(pickle.loads(pickle.dumps(states[at])))
        assert rows(resumed) == served[at : length if at < length else None], at
        assert rows(resumed) == epochs[1 + at // length]


@MONGOD
@WORKERS
@pytest.mark.parametrize("ended", [False, True])
def test_a_stateful_loader_that_served_an_epoch_goes_on_with_the_next(
    db: Datalayer, workers: int, persistent: bool, ended: bool
) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    epochs = epochs_of(db, 3)
    stopped = torchdata.StatefulDataLoader(stream(db), batch_size=None, num_workers=workers)
    batches = iter(stopped)
    for _ in epochs[0]:
        next(batches)
    if ended:
        assert not list(batches)
    resumed = torchdata.StatefulDataLoader(
        stream(db), batch_size=None, num_workers=workers, persistent_workers=persistent
    )
    resumed.load_state_dict(stopped.state_dict())
    # Of an epoch that is served but has not ended, the workers still have to say that nothing is left.
    assert [rows(resumed), rows(resumed)] == ([[], epochs[1]] if workers and not ended else epochs[1:])


@MONGOD
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_goes_on_in_mid_epoch_and_at_its_end(db: Datalayer, tmp_path: Path, workers: int) -> None:
    lightning = pytest.importorskip("lightning")
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    expected = [batch for epoch in epochs_of(db, 3) for batch in epoch]

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen = nn.Linear(2, 1), list[list[int]]()

        def on_train_epoch_start(self) -> None:
            if not workers:
                self.trainer.train_dataloader.set_epoch(self.current_epoch)

        def training_step(self, batch: Any, index: int) -> Any:
            self.seen.append(batch[1].tolist())
            return self.layer(batch[0]).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-9)

    def fit(**resumed: Any) -> list[list[int]]:
        kept = lightning.pytorch.callbacks.ModelCheckpoint(
            tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
        )
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        module, data = Module(), stream(db)
        loader = torchdata.StatefulDataLoader(data, batch_size=None, num_workers=workers) if workers else data
        lightning.Trainer(max_epochs=3, accelerator="cpu", devices=1, callbacks=[kept], **quiet).fit(
            module, loader, **resumed
        )
        return module.seen

    assert fit() == expected
    length = len(expected) // 3
    for step in (3, length - 1, length, length + 1) if not workers else (3, length + 1):
        assert fit(ckpt_path=tmp_path / f"step={step}.ckpt") == expected[step:], step


@MONGOD
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_the_trainer_of_transformers_goes_on_in_mid_epoch(db: Datalayer, tmp_path: Path, workers: int) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    expected = [batch for epoch in epochs_of(db, 3) for batch in epoch]
    seen: list[list[int]] = []

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x: Tensor, n: Tensor) -> dict[str, Tensor]:
            seen.append(n.tolist())
            return {"loss": self.layer(x).mean()}

    class Trainer(transformers.Trainer):  # type: ignore[misc, name-defined]
        def get_train_dataloader(self) -> Any:
            data = self.train_dataset
            return self.accelerator.prepare(
                DataLoader(data, batch_size=None, collate_fn=named, num_workers=workers)
            )

    def train(**resumed: Any) -> list[list[int]]:
        seen.clear()
        arguments = transformers.TrainingArguments(
            tmp_path, num_train_epochs=3, save_steps=5, report_to=[], use_cpu=True, disable_tqdm=True,
            logging_strategy="no",
        )  # fmt: skip
        Trainer(Module(), arguments, train_dataset=stream(db)).train(**resumed)
        return list(seen)

    assert train() == expected
    for step in (5, 20) if not workers else (20,):
        assert train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}")) == expected[step:], step


def named(batch: Any) -> dict[str, Tensor]:
    return {"x": batch[0], "n": batch[1]}
