"""How fast and how lean a model goes into the database and out again, against raw GridFS on the same server.

    python tests/benchmarks/bench_artifacts.py [MONGODB-URI] [--mb 400] [--rounds 4]

Without a URI it starts an embedded server in a temporary folder. Each round writes fresh random bytes, split
into tensors: a raw GridFS upload (`GridFSBucket.upload_from_stream`) and our save, the other way round the next
time. When the server has them on its disk, it reads several times in turn: a raw bulk read of the same bytes (the
chunks of each file that our save wrote, in order, counted), one of what GridFS wrote, our load. It prints medians,
the two ratios that issue 4 asks for, what SHA-256 alone takes, and the peak memory beside the model.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import hashlib
import io
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gridfs
import numpy as np
import torch
from torch import nn

from mongotorch.codecs import Codecs
from mongotorch.mongo.connection import open_address
from mongotorch.settings import read_settings
from mongotorch.store import BlobStore
from mongotorch.train.tensor_codec import TorchCodec

MB = 1_000_000
TENSORS = 20


def model_of(megabytes: int, seed: int) -> nn.Module:
    """A module of so many megabytes of random weights, which no compression can shrink."""
    each = megabytes * MB // 4 // TENSORS
    random = np.random.default_rng(seed)
    return nn.ParameterList(
        torch.from_numpy(random.standard_normal(each, dtype=np.float32)) for _ in range(TENSORS)
    )


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


@contextlib.contextmanager
def peak() -> Iterator[list[float]]:
    """The most resident memory inside, in MB above what there was before."""
    trim()
    said = [0.0]
    stop = threading.Event()
    before = resident()

    def watch() -> None:
        while not stop.wait(0.002):
            said[0] = max(said[0], (resident() - before) / MB)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield said
    finally:
        stop.set()
        thread.join()


def trim() -> None:
    """Give back to the system what was freed: else a reading lives in memory that an earlier one had."""
    with contextlib.suppress(AttributeError):  # not the GNU C library
        ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def one_round(database: Any, megabytes: int, seed: int, readings: int = 3) -> dict[str, list[float]]:
    """Speeds in MB/s and peaks, a list each: two writings in turn about who is first, then `readings` in turn."""
    model = model_of(megabytes, seed)
    parts: list[memoryview] = [p.detach().numpy().data.cast("B") for p in model.parameters()]
    bucket = gridfs.GridFSBucket(database, bucket_name="raw")
    artifacts, codecs = BlobStore(database), Codecs.builtin(TorchCodec())
    said: dict[str, list[float]] = {}

    def measure(name: str, work: Callable[[], Any]) -> Any:
        trim()
        seconds, result = timed(work)
        said.setdefault(name, []).append(megabytes / seconds)
        return result

    def upload() -> None:
        measure("raw upload", lambda: [bucket.upload_from_stream("part", io.BytesIO(part)) for part in parts])

    def save() -> Any:
        with peak() as saving:
            record = measure("save", lambda: codecs.encode(model, artifacts.put))
        said.setdefault("save peak MB", []).append(saving[0])
        return record

    if seed % 2:
        upload()
        record = save()
    else:
        record = save()
        upload()
    # What was written is still on its way to the disk: reading it at once would measure that.
    database.client.admin.command("fsync")
    for _ in range(readings):
        for bucket_name in ("mt.artifacts", "raw"):
            name = "raw read" if bucket_name == "mt.artifacts" else "raw read of GridFS's chunks"
            count = measure(name, functools.partial(raw_read, database, bucket_name))
            assert count >= sum(part.nbytes for part in parts)
        with peak() as loading:
            again = measure("load", lambda: codecs.decode(record, artifacts.get))
        said.setdefault("load peak / model", []).append(loading[0] / megabytes)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        del again
    for name in ("raw.files", "raw.chunks", "mt.artifacts.files", "mt.artifacts.chunks"):
        database[name].delete_many({})
    return said


def raw_read(database: Any, bucket: str) -> int:
    """Read all chunks of a bucket, file by file and in order; how many bytes."""
    files = [file["_id"] for file in database[f"{bucket}.files"].find({}, {"_id": 1})]
    found = (database[f"{bucket}.chunks"].find({"files_id": file}).sort("n", 1) for file in files)
    return sum(len(chunk["data"]) for cursor in found for chunk in cursor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("uri", nargs="?")
    parser.add_argument("--mb", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        uri = given.uri or f"embedded:{folder}?db=bench_artifacts"
        with open_address(uri, read_settings()) as connection:
            BlobStore(connection.database).ensure_indexes()
            one_round(connection.database, 20, 0)  # warm: indexes, pools, imports
            rounds = [one_round(connection.database, given.mb, seed) for seed in range(given.rounds)]
            connection.client.drop_database(connection.database.name)
    medians = {name: [statistics.median(each[name]) for each in rounds] for name in rounds[0]}
    for name, values in medians.items():
        unit = "" if "peak" in name else " MB/s"
        print(f"{name:28} median {statistics.median(values):8.2f}{unit}   {[round(v, 2) for v in values]}")
    block = bytes(100 * MB)
    hashing = 100 / min(timed(lambda: hashlib.sha256(block))[0] for _ in range(3))
    print(f"{'SHA-256 alone':28} {hashing:15.2f} MB/s")
    for ours, raw, wanted in (("save", "raw upload", 0.8), ("load", "raw read", 0.6)):
        ratios = (ours_is / raw_is for ours_is, raw_is in zip(medians[ours], medians[raw], strict=True))
        print(f"{ours} / {raw:12} {statistics.median(ratios):.2f}   (wanted: at least {wanted})")


if __name__ == "__main__":
    main()
