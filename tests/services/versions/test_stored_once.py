"""What is stored is encoded and hashed once; and whatever changes meanwhile, no name stands for other bytes."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import Counter
from typing import Any

import pytest
import torch
from tests.helpers import COLLECTION, fill, points, trainer
from torch import nn

from mongotorch import Always, Datalayer, NewDocuments, Schedule, TorchModel, Worker
from mongotorch.codecs import NamedBlob
from mongotorch.demo import DigitsNet
from mongotorch.errors import IntegrityError
from mongotorch.services.versions.catalog import Catalog
from mongotorch.store import BlobStore
from mongotorch.train.tensor_codec import TorchCodec

WIDTH = 512
LAYER = 4 * WIDTH * WIDTH  # bytes


class Wide(nn.Module):
    """Four layers of a megabyte, of which the second is frozen."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)]
        layers[1].requires_grad_(False)
        self.into, self.layers, self.out = nn.Linear(4, WIDTH), nn.Sequential(*layers), nn.Linear(WIDTH, 3)

    def forward(self, x: Any) -> Any:
        return self.out(self.layers(self.into(x)))


class Counted:
    """Counts the bytes that go through SHA-256 and the calls of the codec of tensors, by what was encoded."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.nbytes, self.encoded, self.decoded = 0, Counter[str](), Counter[str]()
        real, encode, decode = hashlib.sha256, TorchCodec.encode, TorchCodec.decode

        def sha256(data: Any = b"", **given: Any) -> Any:
            self.nbytes += memoryview(data).nbytes
            return Hash(real(data, **given), self)

        def encoding(codec: TorchCodec, value: Any, put: Any, *, where: str) -> Any:
            self.encoded[where] += 1
            return encode(codec, value, put, where=where)

        def decoding(codec: TorchCodec, record: Any, get: Any) -> Any:
            self.decoded[record["skeleton"]] += 1
            return decode(codec, record, get)

        patch.setattr(hashlib, "sha256", sha256)
        patch.setattr(TorchCodec, "encode", encoding)
        patch.setattr(TorchCodec, "decode", decoding)


class Hash:
    def __init__(self, of: Any, counted: Counted) -> None:
        self._of, self._counted = of, counted

    def update(self, data: Any) -> None:
        self._counted.nbytes += memoryview(data).nbytes
        self._of.update(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


def counted_publication(patch: pytest.MonkeyPatch, db: Datalayer, applied: Any) -> Counted:
    """What the publication of a run counts, without what the run counts before it."""
    found: list[Counted] = []
    publish = Catalog.publish

    def counting(*args: Any, **kwargs: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            found.append(Counted(inner))
            return publish(*args, **kwargs)

    patch.setattr(Catalog, "publish", counting)
    db.apply(applied).result()
    (one,) = found
    return one


@pytest.mark.parametrize(("optimizer", "states"), [("SGD", 0), ("Adam", 2)])
def test_a_publication_encodes_and_hashes_once(
    db: Datalayer, monkeypatch: pytest.MonkeyPatch, optimizer: str, states: int
) -> None:
    module = Wide()
    applied = trainer(fill(db), model=TorchModel("wide", object=module), optimizer_cls=optimizer, max_iterations=2)

    counted = counted_publication(monkeypatch, db, applied)

    nbytes = sum(int(part.nbytes) for part in module.state_dict().values())
    trained = nbytes - LAYER
    expected = nbytes + states * trained
    assert expected <= counted.nbytes < expected + 100_000
    assert counted.encoded["object"] == 1
    assert counted.encoded["optimizer_state"] <= 1


def test_storing_what_is_applied_hashes_once(db: Datalayer, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Wide()
    counted = Counted(monkeypatch)
    db.apply(TorchModel("wide", object=module))

    nbytes = sum(int(part.nbytes) for part in module.state_dict().values())
    # `apply` gives the component as it is stored, so its bytes are hashed when they are read, too.
    assert 2 * nbytes <= counted.nbytes < 2 * nbytes + 100_000
    assert counted.encoded["object"] == 1


def test_a_model_of_ours_is_hashed_once_though_its_name_changed(
    db: Datalayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A digest uses the names of the first releases, so its pickle is another one; the tensors are the same."""
    module = DigitsNet()
    counted = Counted(monkeypatch)
    db.apply(TorchModel("digits", object=module))

    nbytes = sum(int(part.nbytes) for part in module.state_dict().values())
    assert counted.encoded["object"] == 2
    assert counted.nbytes < 2 * nbytes + 30_000


def test_a_checkpoint_is_hashed_once(db: Datalayer, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Wide()
    applied = trainer(
        fill(db), model=TorchModel("wide", object=module), optimizer_cls="SGD", max_iterations=4
    ).replace(validation_interval=2)
    db.apply(applied.replace(identifier="u"))
    counted = Counted(monkeypatch)
    db.apply(applied).result()

    nbytes = sum(int(part.nbytes) for part in module.state_dict().values())
    # Applied, read, one checkpoint of what is and what was best (the same memory), published, read.
    assert counted.nbytes < 8 * nbytes


def test_a_schedule_loads_the_served_model_once(db: Datalayer, monkeypatch: pytest.MonkeyPatch) -> None:
    select = fill(db)
    first: Any = db.apply(trainer(select)).result()
    db.apply(Schedule("s", trainer=trainer(select), trigger=NewDocuments(30), gate=Always()))
    db[COLLECTION].raw.insert_many([{**row, "_id": 1000 + row["_id"]} for row in points(30)])
    loaded = Counter[str]()
    load = Catalog._load

    def loading(self: Catalog, document: Any, *met: Any) -> Any:
        loaded[document["_id"]] += 1
        return load(self, document, *met)

    monkeypatch.setattr(Catalog, "_load", loading)
    Worker(db).run(until_idle=True)

    assert db.load("model", "m").version == first.version + 1
    assert loaded[first.uuid] == 1


def test_what_changes_while_it_is_stored_is_refused(db: Datalayer, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = Wide()
    put_all = BlobStore.put_all

    def changing(self: BlobStore, blobs: Any) -> Any:
        with torch.no_grad():  # the blobs are named, and nothing is uploaded
            module.layers[2].weight[300, 300] += 1.0
        return put_all(self, blobs)

    with monkeypatch.context() as patch:
        patch.setattr(BlobStore, "put_all", changing)
        with pytest.raises(IntegrityError, match="changed while it was stored"):
            db.apply(TorchModel("wide", object=module))

    assert db.show("model", "wide") == []
    assert db.verify().problems == ()
    assert db.apply(TorchModel("wide", object=module)).result().version == 0


def test_a_thread_that_trains_on_never_gets_other_bytes_stored(db: Datalayer) -> None:
    module = nn.Linear(1024, 1024)
    stop = threading.Event()

    def train() -> None:
        while not stop.is_set():
            with torch.no_grad():
                module.weight += 1.0

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for number in range(5):
            with contextlib.suppress(IntegrityError):
                db.apply(TorchModel(f"m{number}", object=module))
    finally:
        stop.set()
        thread.join()
    assert db.verify().problems == ()


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20 + 7])
def test_the_name_is_the_sha256_whatever_the_size(size: int) -> None:
    data = bytearray(torch.randint(256, (size,), dtype=torch.uint8).tolist())
    for view in (bytes(data), data, memoryview(data), memoryview(data).toreadonly()):
        blob = NamedBlob.of(view)
        assert blob.name == hashlib.sha256(data).hexdigest()
        assert blob.data.nbytes == size
        assert (blob.checksums is None) == memoryview(view).readonly
