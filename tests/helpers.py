"""What several test files need: small documents, small nets, comparisons to the bit, and another process."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from mongotorch import Datalayer, Query, TorchModel, TorchTrainer
from mongotorch.train import Fit

COUNT = 120
COLLECTION = "points"


class Blobs(dict[str, bytes]):
    """Blobs by content, as a store keeps them: what is read is a buffer of the reader's own."""

    def put(self, data: bytes | memoryview) -> str:
        name = hashlib.sha256(data).hexdigest()
        self[name] = bytes(data)
        return name

    def blob(self, name: str) -> bytes:
        return cast("bytes", bytearray(self[name]))


def points(count: int = COUNT) -> list[dict[str, Any]]:
    """Documents of three classes: `x` of shape (4,), the label `y`, and `n`, which is as unique as `_id`."""
    draw = random.Random(7)
    centers = [[draw.uniform(-2, 2) for _ in range(4)] for _ in range(3)]
    rows = ([draw.gauss(c, 0.5) for c in centers[n % 3]] for n in range(count))
    return [{"_id": n, "x": row, "y": n % 3, "n": n} for n, row in enumerate(rows)]


def fill(db: Datalayer, count: int = COUNT) -> Query:
    """Insert the documents, in another order than that of their `_id`; the query of all of them."""
    documents = points(count)
    random.Random(1).shuffle(documents)
    db[COLLECTION].insert_many(documents)
    return db[COLLECTION].find()


def fold_ids(db: Datalayer, fold: Any) -> list[int]:
    """The `_id`s of a fold, ascending."""
    return [document["_id"] for document in db.execute(db[COLLECTION].find().sort("_id").fold(fold))]


def seeded(make: Any, seed: int = 0) -> Any:
    """What `make()` builds from a seed, the program's own generator untouched."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def net(seed: int = 0) -> nn.Sequential:
    """A small classifier of points."""
    made: nn.Sequential = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), seed)
    return made


def model(seed: int = 0, identifier: str = "m", **given: Any) -> TorchModel:
    """A model of the small net."""
    return TorchModel(identifier, **{"object": net(seed), **given})


def trainer(select: Query, cls: type[TorchTrainer] = TorchTrainer, **given: Any) -> TorchTrainer:
    """A trainer of 12 steps that validates every 4th."""
    usual: dict[str, Any] = {
        "key": ("x", "y"),
        "select": select,
        "objective": nn.functional.cross_entropy,
        "loader_kwargs": {"batch_size": 16},
        "optimizer_kwargs": {"lr": 0.01},
        "max_iterations": 12,
        "validation_interval": 4,
        "model": model(),
    }
    return cls("t", **{**usual, **given})


def same(first: Any, second: Any) -> bool:
    """Whether two structures are equal, tensors to the bit and with their dtype."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, Mapping):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def state(of: TorchModel | nn.Module) -> dict[str, Tensor]:
    """A copy of the state of a model."""
    module = of.object if isinstance(of, TorchModel) else of
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def documents_in(db: Datalayer) -> dict[str, int]:
    """How many documents each collection of ours has, leaving out the empty ones."""
    database = db[COLLECTION].raw.database
    names = [name for name in database.list_collection_names() if name.startswith("mt.")]
    counts = {name: database[name].count_documents({}) for name in sorted(names)}
    return {name: count for name, count in counts.items() if count}


def run_elsewhere(uri: str, code: str, **given: Any) -> Any:
    """Run a script in another process.

    Args:
        uri: What `Datalayer.connect()` opens there.
        code: The script; it finds `given` as the dict GIVEN, and what it calls ANSWER comes back, by JSON.
        given: Values for it, by JSON.
    """
    head = f"import json, sys\nGIVEN = json.loads({json.dumps(given)!r})\n"
    script = head + textwrap.dedent(code) + "\nprint('\\n' + json.dumps(ANSWER))\n"
    environment = {**os.environ, "MONGOTORCH_URI": uri, "MONGOTORCH_PROGRESS": "false"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-"],
        input=script,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def number_of(output: Tensor, n: Tensor) -> Tensor:
    """An objective whose target tells which documents a batch is of."""
    return nn.functional.mse_loss(output[:, 0], n.float() / COUNT)


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Recorder(TorchTrainer):
    """A trainer that keeps the targets of each batch that it steps on; clear `steps` before."""

    steps: ClassVar[list[list[int]]] = []

    def take_step(self, model: TorchModel, batch: Any, optimizers: Any) -> Tensor:
        """A step as always."""
        self.steps.append(batch[-1].tolist())
        return super().take_step(model, batch, optimizers)


class Replayed:
    """Batches of a list, epoch after epoch, with a position: what `Fit` needs of a stream."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.at = batches, 0

    def __iter__(self) -> Iterator[Any]:
        while self.at < len(self.batches):
            self.at += 1
            yield self.batches[self.at - 1]
        self.at = 0

    def __len__(self) -> int:
        return len(self.batches)

    def state_dict(self) -> dict[str, Any]:
        """Behind the last batch that was given."""
        return {"at": self.at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there."""
        self.at = state["at"]


SELECT = Query.find(COLLECTION)
_DRAWN = torch.Generator().manual_seed(5)
BATCHES = [(torch.randn(8, 4, generator=_DRAWN), torch.randint(3, (8,), generator=_DRAWN)) for _ in range(5)]


def fit(of: TorchTrainer, module: nn.Module | None = None, batches: Any = None, **given: Any) -> Fit:
    """A run over BATCHES, validated on the first two of them, without a database."""
    chosen = TorchModel("m", object=module or net(), validation=given.pop("validation", None))
    replayed = Replayed(BATCHES if batches is None else batches)
    return Fit(of, chosen, batches=replayed, sets={"": BATCHES[:2]}, **given)
