"""The documents that the stream is measured on, and the server that holds them.

Always: ten classes, 64 features of random numbers around the center of the class, so that a net has something to
learn and nothing compresses; the same documents for every contender; made once for a number of documents.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from bson import Binary
from pymongo import MongoClient

from mongotorch.mongo.embedded_server import EmbeddedServer

FEATURES, CLASSES = 64, 10
PROJECTION = {"_id": 1, "x": 1, "y": 1}
_CHUNK = 10_000

Arrays = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]


@final
class AddressedClient(MongoClient[dict[str, Any]]):
    """A client that knows its address, so that workers can open one of their own.

    Args:
        uri: The address, with the user and the password.
    """

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.uri = uri


@contextlib.contextmanager
def database(uri: str | None) -> Iterator[tuple[str, Any]]:
    """The URI and the open database: the one that is named, else a mongod of its own in a temporary folder."""
    with contextlib.ExitStack() as stack:
        if uri is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mongotorch-bench-")))
            cache = ("--wiredTigerCacheSizeGB", "2")
            uri = stack.enter_context(EmbeddedServer.open(folder, arguments=cache)).uri("bench")
        client = stack.enter_context(AddressedClient(uri))
        yield uri, client.get_default_database()


def arrays(count: int, seed: int = 0, *, by_label: bool = False) -> Iterator[Arrays]:
    """Features and labels, chunk by chunk."""
    draw = np.random.default_rng(seed)
    centers = draw.normal(size=(CLASSES, FEATURES))
    for first in range(0, count, _CHUNK):
        size = min(_CHUNK, count - first)
        labels = draw.integers(0, CLASSES, size)
        if by_label:
            labels = (np.arange(first, first + size) * CLASSES) // count
        noise = draw.normal(size=(size, FEATURES))
        yield (centers[labels] + noise).astype(np.float32), labels.astype(np.int64)


def tensors(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All of it in memory: what the in-memory contenders start from."""
    chunks = list(arrays(count))
    features, labels = (np.concatenate([chunk[n] for chunk in chunks]) for n in range(2))
    return torch.from_numpy(features), torch.from_numpy(labels)


def fill(
    base: Any, name: str, count: int, *, vectors: bool, by_label: bool = False, clustered: bool = False
) -> None:
    """A collection of so many documents, unless it is there already."""
    if base[name].estimated_document_count() == count:
        return
    base.drop_collection(name)
    if clustered:
        base.create_collection(name, clusteredIndex={"key": {"_id": 1}, "unique": True})
    for features, labels in arrays(count, by_label=by_label):
        rows = _vectors(features) if vectors else features.astype(np.float64).tolist()
        base[name].insert_many(
            [{"x": row, "y": label, "_fold": "train"} for row, label in zip(rows, labels.tolist(), strict=True)],
            ordered=False,
        )


def _vectors(features: npt.NDArray[np.float32]) -> list[Binary]:
    return [Binary(b"\x27\x00" + row.astype("<f4").tobytes(), 9) for row in features]
