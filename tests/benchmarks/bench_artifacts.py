"""How fast and how lean a model goes into the database and out again, against raw GridFS on the same server.

    python tests/benchmarks/bench_artifacts.py [MONGODB-URI] [--mb 400] [--rounds 5]

Without a URI it starts an embedded server in a temporary folder. Each round writes fresh random bytes, split
into tensors, and measures one after the other: a raw GridFS upload (`GridFSBucket.upload_from_stream`), our
save, a raw bulk read of what GridFS wrote (the chunks of each file, in order, counted), our load. It prints the
medians of the rounds and the two ratios that issue 4 asks for, and the peak memory beside the model.
"""

from __future__ import annotations

import argparse
import contextlib
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
from mongotorch.settings import read_settings
from mongotorch.store import Artifacts, open_address
from mongotorch.train.codec import TorchCodec

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


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def one_round(database: Any, megabytes: int, seed: int) -> dict[str, float]:
    model = model_of(megabytes, seed)
    parts: list[memoryview] = [p.detach().numpy().data.cast("B") for p in model.parameters()]
    bucket = gridfs.GridFSBucket(database, bucket_name="raw")
    artifacts, codecs = Artifacts(database), Codecs.builtin(TorchCodec())

    def raw_upload() -> list[Any]:
        return [bucket.upload_from_stream("part", io.BytesIO(part)) for part in parts]

    def raw_read() -> int:
        found = (database["raw.chunks"].find({"files_id": file}).sort("n", 1) for file in files)
        return sum(len(chunk["data"]) for cursor in found for chunk in cursor)

    upload, files = timed(raw_upload)
    with peak() as saving:
        save, record = timed(lambda: codecs.encode(model, artifacts.put))
    read, count = timed(raw_read)
    with peak() as loading:
        load, again = timed(lambda: codecs.decode(record, artifacts.get))
    assert count == sum(part.nbytes for part in parts)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    for name in ("raw.files", "raw.chunks", "mt.artifacts.files", "mt.artifacts.chunks"):
        database[name].delete_many({})
    speeds = {"raw upload": upload, "save": save, "raw read": read, "load": load}
    peaks = {"save peak MB": saving[0], "load peak / model": loading[0] / megabytes}
    return {name: megabytes / seconds for name, seconds in speeds.items()} | peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("uri", nargs="?")
    parser.add_argument("--mb", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        uri = given.uri or f"embedded:{folder}?db=bench_artifacts"
        with open_address(uri, read_settings()) as connection:
            Artifacts(connection.database).ensure_indexes()
            one_round(connection.database, 20, 0)  # warm: indexes, pools, imports
            rounds = [one_round(connection.database, given.mb, seed) for seed in range(given.rounds)]
            connection.client.drop_database(connection.database.name)
    for name in rounds[0]:
        values = [each[name] for each in rounds]
        unit = "" if "peak" in name else " MB/s"
        print(f"{name:20} median {statistics.median(values):8.2f}{unit}   {[round(v, 2) for v in values]}")
    for ours, raw, wanted in (("save", "raw upload", 0.8), ("load", "raw read", 0.6)):
        ratio = statistics.median(each[ours] / each[raw] for each in rounds)
        print(f"{ours} / {raw:12} {ratio:.2f}   (wanted: at least {wanted})")


if __name__ == "__main__":
    main()
