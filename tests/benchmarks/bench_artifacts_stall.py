"""How long a training step waits for a checkpoint, and what the writing behind it costs the steps.

    python -m tests.benchmarks.bench_artifacts_stall [MONGODB-URI] [--mb 100] [--rounds 8]

Without a URI it starts an embedded server in a temporary folder. It trains a model with Adam, whose state is three
times the model, as a run does. In each round it measures, one after the other: some steps alone, a copy of all
tensors of the state (the yardstick), the stall (`Fit.capture` and `CheckpointWriter.write`, all that a
checkpoint costs the training thread), and the steps during which the checkpoint is written.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import Any, final

import torch
from tests.benchmarks.bench_artifacts import MB, timed, trim
from torch import Tensor, nn

from mongotorch import Query, TorchModel, TorchTrainer
from mongotorch.codecs import Codecs
from mongotorch.mongo.connection import open_address
from mongotorch.services.training.checkpoints import CheckpointWriter, RunCheckpoints
from mongotorch.settings import read_settings
from mongotorch.store import BlobStore, Checkpoints, Jobs
from mongotorch.train import Fit
from mongotorch.train.tensor_codec import TorchCodec

LAYERS = 8
ALONE = 6  # steps that are measured with nothing in the background


@final
class Batches:
    """The same batch for ever, in memory: reading must not be in what is measured."""

    def __init__(self, width: int) -> None:
        self._batch = (torch.randn(16, width), torch.randn(16, width))

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self._batch

    def state_dict(self) -> dict[str, Any]:
        """It has no place."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """It has no place."""


def fit_of(megabytes: int) -> Fit:
    """A run of a model of so many megabytes, which never ends."""
    width = int((megabytes * MB / 4 / LAYERS) ** 0.5)
    net = nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))
    model = TorchModel("stall", object=net, preferred_devices=("cpu",))
    trainer = TorchTrainer(
        "stall-trainer",
        key=("x", "y"),
        select=Query.find("nothing"),
        objective=nn.functional.mse_loss,
        loader_kwargs={"batch_size": 16},
        optimizer_kwargs={"lr": 1e-6},
        validation_interval=None,
        max_iterations=10**9,
        model=model,
    )
    return Fit(trainer, model, batches=Batches(width), sets={})


def tensors_of(state: Any) -> list[Tensor]:
    """The tensors of a captured state."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, Mapping):
        return [tensor for part in state.values() for tensor in tensors_of(part)]
    if isinstance(state, list | tuple):
        return [tensor for part in state for tensor in tensors_of(part)]
    return []


def one_round(
    fit: Fit, events: Iterator[Any], writer: CheckpointWriter, live: list[Tensor], written: threading.Event
) -> dict[str, float]:
    """Seconds of each; `live` are the tensors of the run itself, `written` is set when a checkpoint is stored."""
    written.clear()
    alone = statistics.median(timed(lambda: next(events))[0] for _ in range(ALONE))
    trim()
    copy, copies = timed(lambda: [tensor.clone() for tensor in live])
    del copies
    trim()
    stall, _ = timed(lambda: writer.write(fit.capture()))
    during = []
    while not written.is_set():
        during.append(timed(lambda: next(events))[0])
    return {
        "step alone": alone,
        "one copy of the state": copy,
        "stall": stall,
        "step while it is written": statistics.median(during),
        "steps while it is written": float(len(during)),
        "writing": sum(during),
    }


def measure(database: Any, megabytes: int, rounds: int) -> list[dict[str, float]]:
    """All rounds; the first, which warms everything up, is left out."""
    jobs, artifacts = Jobs(database), BlobStore(database)
    checkpoints = Checkpoints(database)
    for part in (jobs, artifacts, checkpoints):
        part.ensure_indexes()
    jobs.add(component="stall", type_id="trainer", identifier="stall-trainer")
    claimed = jobs.claim(worker="bench", lease_s=36_000)
    assert claimed is not None
    checkpointing = RunCheckpoints(checkpoints, artifacts, Codecs.builtin(TorchCodec()))
    fit = fit_of(megabytes)
    events = fit.run()
    next(events)  # only now it has an optimizer, with a state
    live = [*fit._model.object.state_dict().values()]  # the run's own tensors, not copies of them
    live += [tensor for one in fit._optimizers for tensor in tensors_of(one.state_dict())]
    written = threading.Event()

    def save(state: Mapping[str, Any]) -> None:
        checkpointing.save(claimed, state, run={}, blobs={})
        written.set()

    with CheckpointWriter(save, interval_s=0) as writer:
        return [one_round(fit, events, writer, live, written) for _ in range(rounds + 1)][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("uri", nargs="?")
    parser.add_argument("--mb", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        uri = given.uri or f"embedded:{folder}?db=bench_stall"
        with open_address(uri, read_settings()) as connection:
            rounds = measure(connection.database, given.mb, given.rounds)
            connection.client.drop_database(connection.database.name)
    for name in rounds[0]:
        values = [each[name] for each in rounds]
        shown = [round(value, 3) for value in values]
        print(f"{name:26} median {statistics.median(values):8.3f}{'' if 'steps' in name else ' s'}   {shown}")
    stall = statistics.median(each["stall"] / each["one copy of the state"] for each in rounds)
    slower = statistics.median(each["step while it is written"] / each["step alone"] for each in rounds)
    print(f"stall / one copy           {stall:.2f}   (wanted: at most 1.5)")
    print(f"step while it is written / step alone  {slower:.2f}")


if __name__ == "__main__":
    main()
