"""Who serves an epoch, and by what way: the stream in its modes, and what people use otherwise.

Always: a contender is a function that gives the batches of one epoch, tensors of 256 rows, shuffled; where it can
keep something between epochs (a plan, tables, shards) that is made before the clock starts.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from pymongo import MongoClient
from tests.benchmarks.stream_data import FEATURES, PROJECTION, arrays
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from mongotorch.data import Stream, StreamSpec
from mongotorch.query import Query

BATCH = 256
WORKER = {"num_workers": 1, "persistent_workers": True}
Batches = Iterable[Any]
Epoch = Callable[[], Batches]


RAW_DRAINS: dict[str, dict[str, Any]] = {
    "": {},
    ", 1,000 a reply": {"batch_size": 1000},
    ", 5,000 a reply": {"batch_size": 5000},
    ", 1,000 a reply, without _id": {"batch_size": 1000, "projection": {**PROJECTION, "_id": 0}},
}
"""Ways to drain a collection by `_id` with one cursor, of which the fastest is what a stream is compared with."""


def raw_drain(
    collection: Any, *, projection: Any = PROJECTION, natural: bool = False, **options: Any
) -> Iterator[bytes]:
    """Raw BSON from one cursor, by `_id` or in natural order."""
    order = [("$natural", 1)] if natural else [("_id", 1)]
    yield from collection.find_raw_batches({}, projection, sort=order, **options)


def stream(base: Any, name: str, **given: Any) -> Stream:
    """The stream over a collection, reading ahead in threads unless `loader` has workers."""
    uri, database = base.client.uri, base.name

    def opened() -> Any:
        return MongoClient[dict[str, Any]](uri)[database]

    options = {"batch_size": BATCH, "shuffle": True, "data_prefetch": True, **given}
    return Stream(opened, StreamSpec(query=Query.find(name), **{"key": ("x", "y"), **options}), database=base)


def onward(base: Any, name: str, *, worker: bool = False) -> Stream:
    """The stream as a trainer has it: it reads on across the ends of epochs, in a thread or in a worker."""
    return stream(base, name, across_epochs=True, **({"loader": WORKER} if worker else {}))


def hand_sliced(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Tensors in memory, a permutation, and two index operations a batch."""
    order = torch.randperm(len(x))
    for part in torch.split(order, BATCH):
        yield x[part], y[part]


def tensor_loader(x: Tensor, y: Tensor) -> Epoch:
    """The usual way in memory: samples one by one, collated."""
    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True)
    return lambda: loader


class _Naive(IterableDataset[Any]):
    """A cursor, and a tensor a document."""

    def __init__(self, collection: Any) -> None:
        self._collection = collection

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for document in self._collection.find({}, PROJECTION):
            value = document["x"]
            if isinstance(value, bytes):
                yield torch.frombuffer(bytearray(value[2:]), dtype=torch.float32), document["y"]
            else:
                yield torch.tensor(value), document["y"]


def naive_cursor(collection: Any) -> Epoch:
    """What a first try looks like; in natural order, since it cannot shuffle."""
    loader = DataLoader(_Naive(collection), batch_size=BATCH)
    return lambda: loader


def arrow_reader(collection: Any) -> Callable[[], Any] | None:
    """PyMongoArrow's `find_arrow_all` with a schema; None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            api = importlib.import_module("pymongoarrow.api")
            arrow = importlib.import_module("pyarrow")
    except ImportError:
        return None
    schema = api.Schema({"x": arrow.list_(arrow.float64()), "y": arrow.int64()})
    return lambda: api.find_arrow_all(collection, {}, schema=schema)


def arrow_decoder(raws: list[bytes]) -> Callable[[], Any] | None:
    """PyMongoArrow's decoder alone, over BSON in memory; None where it is not installed."""
    if arrow_reader(None) is None:
        return None
    api, arrow = importlib.import_module("pymongoarrow.api"), importlib.import_module("pyarrow")
    make = importlib.import_module("pymongoarrow.context").PyMongoArrowContext
    schema = api.Schema({"x": arrow.list_(arrow.float64()), "y": arrow.int64()})

    def decode() -> Any:
        context = make(schema)
        for raw in raws:
            context.process_bson_stream(raw)
        return context.finish()

    return decode


def mosaic(count: int, folder: Path) -> Epoch | None:
    """MosaicML Streaming over local MDS shards of the same numbers; None where it is not installed."""
    if importlib.util.find_spec("streaming") is None:
        return None
    # Its package imports its image, text and multimodal data sets, and through those torchvision and
    # transformers, of which nothing is used here and a CPU build of torch has no matching torchvision.
    for name in ("streaming.text", "streaming.vision", "streaming.multimodal", "transformers"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["transformers"].__dict__.update(BatchEncoding=_Nothing, BatchFeature=_Nothing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        streaming = importlib.import_module("streaming")
    with streaming.MDSWriter(out=str(folder), columns={"x": f"ndarray:float32:{FEATURES}", "y": "int"}) as writer:
        for features, labels in arrays(count):
            for row, label in zip(features, labels.tolist(), strict=True):
                writer.write({"x": row, "y": label})
    dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=BATCH)
    return lambda: loader


class _Nothing:
    """Stands for classes of packages that are not needed."""
