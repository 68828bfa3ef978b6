"""How fast a model is published, against a raw GridFS upload of the same bytes to the same server.

    python -m tests.benchmarks.bench_publish [--uri MONGODB-URI] [--mb 400] [--rounds 8]

Each measurement is a process of its own: one uploads with pymongo's `GridFSBucket.upload_from_stream`, one file
for each tensor; the other publishes a model as a run does, which encodes it, hashes it once, sends its blobs and
inserts the documents. The two take turns, and who is first changes from round to round. Each warms up with a small
model, and both write with the concerns of mongotorch's own collections. The ratio is the median of those of the
rounds.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import gridfs
import torch
from tests.benchmarks.bench_artifacts import model_of
from tests.benchmarks.stream_data import database

from mongotorch import Query, TorchModel, TorchTrainer
from mongotorch.mongo.connection import open_address
from mongotorch.mongo.server_features import records
from mongotorch.services.versions.catalog import Catalog
from mongotorch.settings import read_settings

_WARM_MB = 20


def uploader(base: Any) -> Callable[[Any, str], None]:
    """Uploads the tensors of a module to a bucket of its own."""
    concerns = records(base, "mt.artifacts.files")
    bucket = gridfs.GridFSBucket(base, "raw", write_concern=concerns.write_concern)

    def upload(module: Any, name: str) -> None:
        for part in module.parameters():
            bucket.upload_from_stream(name, io.BytesIO(part.detach().numpy().data.cast("B")))

    return upload


def publisher(base: Any) -> Callable[[Any, str], None]:
    """Publishes a module as a run does, with a trainer that has no state."""
    catalog = Catalog(base)
    catalog.ensure_indexes()

    def publish(module: Any, name: str) -> None:
        model = TorchModel(name, object=module)
        trainer = TorchTrainer(
            name, key=("x", "y"), select=Query.find("rows"), objective=torch.add, max_iterations=1
        )
        trainer = trainer.replace(validation_interval=None, model=model)
        object.__setattr__(model, "trainer", trainer)  # as a run lets them refer to each other
        records = {one.uuid: {"job": name} for one in (model, trainer)}
        catalog.publish(model, partner=trainer, records=records, blobs={})

    return publish


def measure(kind: str, uri: str, megabytes: int, seed: int) -> float:
    """Seconds that one of the two takes in this process, after a warm-up."""
    torch.set_num_threads(1)
    with open_address(uri, read_settings()) as connection:
        work = {"raw": uploader, "publish": publisher}[kind](connection.database)
        work(model_of(_WARM_MB, 10_000 + seed), f"warm-{kind}-{seed}")
        module = model_of(megabytes, seed)
        start = time.perf_counter()
        work(module, f"{kind}-{seed}")
        return time.perf_counter() - start


def rounds_of(uri: str, base: Any, megabytes: int, rounds: int, say: Callable[[str], object]) -> list[float]:
    """The speed of publishing over that of uploading, for each round."""
    found: list[float] = []
    for number in range(rounds):
        order = ("raw", "publish") if number % 2 else ("publish", "raw")
        seconds: dict[str, float] = {}
        for kind in order:
            # What was written before is on its way to the disk, which would slow down whoever comes second.
            base.client.admin.command("fsync")
            seconds[kind] = _elsewhere(kind, uri, megabytes, number)
        found.append(seconds["raw"] / seconds["publish"])
        rates = ", ".join(f"{kind} {megabytes / each:.0f} MB/s" for kind, each in sorted(seconds.items()))
        say(f"round {number + 1}: {rates}, ratio {found[-1]:.2f}")
        for name in base.list_collection_names():
            if name.startswith(("raw.", "mt.")):
                base[name].delete_many({})
    return found


def _elsewhere(kind: str, uri: str, megabytes: int, seed: int) -> float:
    command = [sys.executable, "-m", "tests.benchmarks.bench_publish", "--only", kind]
    command += ["--uri", uri, "--mb", str(megabytes), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Measure it, or one of the two in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uri", help="a MongoDB with a database in its path; else one is started")
    parser.add_argument("--mb", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", choices=("raw", "publish"), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(measure(given.only, given.uri, given.mb, given.seed))
        return
    with database(given.uri) as (uri, base):
        found = rounds_of(uri, base, given.mb, given.rounds, print)
    print(
        f"publish over raw GridFS upload, {given.mb} MB: {statistics.median(found):.2f} x "
        f"(median of {given.rounds}; load {os.getloadavg()[1]:.1f})"
    )


if __name__ == "__main__":
    main()
