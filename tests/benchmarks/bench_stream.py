"""How fast documents become batches, against the raw cursor, tensors in memory, and what others offer.

    make bench                       (or: python -m tests.benchmarks.bench_stream)
    make bench ARGS='--docs 1000000 --rounds 7'

It makes its own documents on a mongod of its own (or at --uri), measures every contender once a round, prints one
table and writes docs/benchmarks.json and docs/benchmarks.png. Ratios are medians of the rounds; absolute numbers
are those of the machine and of what else it did.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tests.benchmarks import stream_contenders as contenders
from tests.benchmarks import stream_scale as scale
from tests.benchmarks.bench_publish import rounds_of
from tests.benchmarks.stream_data import database, fill, tensors
from tests.benchmarks.stream_rounds import Contender, Rounds, drained, slow_width, step_seconds, trained
from tests.benchmarks.stream_samples import sample_rows
from tests.benchmarks.stream_shapes import shape_rows
from tests.benchmarks.stream_show import Row, plot, show, write_page

from mongotorch.data import Stream
from mongotorch.data.decode.decoder import decode

MB = 2**20
_PUBLISHED_MB = 400
_PART = 10  # MosaicML serves a tenth of the documents, or a round would be mostly its own
_EPOCHS = 5  # in a row, since nobody trains for one; the naive cursor and MosaicML, which are slow, get one


def reading(base: Any, rounds: int, say: Callable[[str], object]) -> Rounds:
    """Drains and loads of the same documents as vectors and as lists."""
    raws = list(base["lists"].find_raw_batches({}, {"_id": 1, "x": 1, "y": 1}))
    found: dict[str, Contender | None] = {"arrow decode": contenders.arrow_decoder(raws)}
    found["decode"] = lambda: [decode(raw, ("x", "y")) for raw in raws]
    found["arrow lists"] = contenders.arrow_reader(base["lists"])
    for name in ("vectors", "lists"):
        for kind, options in contenders.RAW_DRAINS.items():
            drain = functools.partial(contenders.raw_drain, base[name], **options)
            found[f"raw {name}{kind}"] = drained(drain)
        natural = functools.partial(contenders.raw_drain, base[name], natural=True, batch_size=1000)
        found[f"raw {name}, natural order"] = drained(natural)
        found[f"stream {name}"] = drained(contenders.stream(base, name).__iter__)
        found[f"load {name}"] = loading(base, name, mode="memory")
    found["stream clustered"] = drained(contenders.stream(base, "clustered").__iter__)
    found["download vectors"] = loading(base, "vectors", mode="download")
    return Rounds({name: one for name, one in found.items() if one is not None}).run(rounds, say)


def loading(base: Any, name: str, *, mode: str) -> Contender:
    """Read it all, up to the first batch."""

    def run() -> object:
        with (
            tempfile.TemporaryDirectory() as folder,
            contenders.stream(base, name, mode=mode, cache_dir=Path(folder)) as made,
        ):
            return next(iter(made))

    return run


def streaming(made: Stream, width: int, *, epochs: int = _EPOCHS) -> Contender:
    """Epochs from the first one on; what was read ahead for more is dropped inside their time."""
    return trained(made.__iter__, width, epochs=epochs, end=lambda: made.set_epoch(0))


def training(base: Any, count: int, rounds: int, folder: Path, say: Callable[[str], object]) -> Rounds:
    """Epochs of a small net."""
    x, y = tensors(count)
    many: dict[str, Contender] = {
        "hand-sliced": trained(lambda: contenders.hand_sliced(x, y), 128, epochs=_EPOCHS),
        "DataLoader": trained(contenders.tensor_loader(x, y), 128, epochs=_EPOCHS),
        "in_memory": streaming(contenders.stream(base, "vectors", mode="memory"), 128),
        "download": streaming(contenders.stream(base, "vectors", mode="download", cache_dir=folder), 128),
    }
    single: dict[str, Contender] = {}
    for name in ("vectors", "lists"):
        many[f"stream {name}"] = streaming(contenders.onward(base, name), 128)
        many[f"stream {name}, 1 worker"] = streaming(contenders.onward(base, name, worker=True), 128)
        single[f"naive cursor, {name}"] = trained(contenders.naive_cursor(base[name]), 128)
    for name, worker in (("vectors", False), ("vectors, 1 worker", True)):
        made = contenders.onward(base, "vectors", worker=worker)
        single[f"stream {name}, one epoch"] = streaming(made, 128, epochs=1)
    parts = dict.fromkeys(many, 1 / _EPOCHS)
    mosaic = contenders.mosaic(count // _PART, folder / "mds")
    if mosaic is not None:
        single["MosaicML MDS"], parts["MosaicML MDS"] = trained(mosaic, 128), _PART
    return Rounds({**many, **single}, larger=parts).run(rounds, say)


def slow_steps(base: Any, count: int, width: int, rounds: int, say: Callable[[str], object]) -> Rounds:
    """Epochs of a net whose step takes a millisecond or more."""
    x, y = tensors(count)
    made = {
        "stream vectors": streaming(contenders.onward(base, "vectors"), width),
        "stream vectors, 1 worker": streaming(contenders.onward(base, "vectors", worker=True), width),
        "hand-sliced": trained(lambda: contenders.hand_sliced(x, y), width, epochs=_EPOCHS),
    }
    return Rounds(made, larger=dict.fromkeys(made, 1 / _EPOCHS)).run(rounds, say)


def ratio_rows(read: Rounds, train: Rounds, slow: Rounds, slow_step: float) -> Iterator[Row]:
    """The rows that are ratios of one run."""
    for name, ordered, natural in (("vectors", 1.0, 0.8), ("lists", 0.6, None)):
        ratios = {kind: read.speed(f"stream {name}", f"raw {name}{kind}") for kind in contenders.RAW_DRAINS}
        fastest = min(ratios, key=lambda kind: ratios[kind] or 0.0)
        note = f"the fastest of {len(ratios)}: {fastest.removeprefix(', ') or 'as the driver asks'}"
        yield Row(
            what=f"drain, {name}, over the fastest raw drain by _id",
            value=ratios[fastest],
            target=ordered,
            note=note,
        )
        value = read.speed(f"stream {name}", f"raw {name}, natural order")
        yield Row(what=f"drain, {name}, over raw drain in natural order", value=value, target=natural)
    clustered = read.speed("stream clustered", "stream vectors")
    yield Row(what="drain, vectors, clustered collection over plain", value=clustered)
    missing = "" if "arrow lists" in read.seconds else "pymongoarrow is not installed"
    yield Row(
        what="list decode over PyMongoArrow's", value=read.speed("decode", "arrow decode"), target=3, note=missing
    )
    yield Row(
        what="lists into columns over find_arrow_all", value=read.speed("load lists", "arrow lists"), note=missing
    )
    for name in ("vectors", "vectors, 1 worker", "lists", "lists, 1 worker"):
        ours = f"stream {name}"
        loader, sliced = (1.4, 0.7) if name.startswith("vectors") else (None, None)
        yield Row(what=f"MLP epoch, {name}, over DataLoader", value=train.speed(ours, "DataLoader"), target=loader)
        yield Row(
            what=f"MLP epoch, {name}, over hand-sliced", value=train.speed(ours, "hand-sliced"), target=sliced
        )
    for name in ("vectors", "vectors, 1 worker"):
        alone = train.speed(f"stream {name}, one epoch", "hand-sliced")
        yield Row(what=f"MLP, one epoch alone, {name}, over hand-sliced", value=alone)
    for name in ("vectors", "lists"):
        naive = train.speed(f"stream {name}", f"naive cursor, {name}")
        yield Row(what=f"MLP epoch, {name}, over naive cursor", value=naive)
    missing = (
        f"a {_PART}th of the documents"
        if "MosaicML MDS" in train.seconds
        else "mosaicml-streaming is not installed"
    )
    yield Row(
        what="MLP epoch, vectors, over MosaicML MDS",
        value=train.speed("stream vectors", "MosaicML MDS"),
        note=missing,
    )
    step = f"a step of {slow_step * 1e3:.1f} ms"
    for name in ("vectors", "vectors, 1 worker"):
        value = slow.speed(f"stream {name}", "hand-sliced")
        yield Row(what=f"slow step, {name}, over hand-sliced", value=value, target=0.95, note=step)
    for mode in ("in_memory", "download"):
        yield Row(what=f"{mode} epoch over hand-sliced", value=train.speed(mode, "hand-sliced"), target=0.95)
    yield Row(
        what="in_memory load, vectors, over raw drain", value=read.speed("load vectors", "raw vectors"), target=0.8
    )
    yield Row(what="in_memory load, lists, over raw drain", value=read.speed("load lists", "raw lists"))
    yield Row(what="download load over raw drain", value=read.speed("download vectors", "raw vectors"), target=0.8)


def scale_rows(uri: str, base: Any, many: int, rounds: int, say: Callable[[str], object]) -> Iterator[Row]:
    """The rows about what must not grow with the collection."""
    few = max(many // 10, 1)
    fill(base, "few", few, vectors=True)
    fill(base, "many", many, vectors=True, by_label=True)
    say(f"{many} documents are there")
    peaks = [(scale.peak_bytes(uri, "few"), scale.peak_bytes(uri, "many")) for _ in range(3)]
    more = sorted(large - small for small, large in peaks)[1] / MB
    note = f"{many:,} against {few:,} documents, peak {peaks[0][1] / MB:.0f} MB"
    yield Row(what="memory", value=more, target=32, most=True, unit="MB more", note=note)
    say("memory")
    first = scale.first_batch_seconds(base, "many", rounds)
    yield Row(
        what="first batch, shuffled, no plan yet", value=first, target=0.5, most=True, unit="s", note=f"{many:,}"
    )
    resumed, state = scale.resume_seconds(base, "many", many, rounds)
    yield Row(
        what="first batch after resume at 90 %", value=resumed, target=1, most=True, unit="s", note=f"{many:,}"
    )
    yield Row(what="state", value=state, target=1024, most=True, unit="bytes")
    say("first batches")
    mixed = scale.entropy_ratio(base, "many", many)
    yield Row(
        what="label entropy, inserted by label, over true shuffle", value=mixed, target=0.95, note=f"{many:,}"
    )


def publish_row(uri: str, base: Any, rounds: int, say: Callable[[str], object]) -> Row:
    """The row about storing what was trained."""
    found = statistics.median(rounds_of(uri, base, _PUBLISHED_MB, rounds, say))
    note = "one process each, in turn; hashed once"
    return Row(what=f"publish of {_PUBLISHED_MB} MB over raw GridFS upload", value=found, target=1, note=note)


def main() -> None:
    """Measure all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=int, default=200_000, help="documents of the throughput rows")
    parser.add_argument(
        "--many", type=int, default=1_000_000, help="documents of the scale rows; 0 leaves them out"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--uri", help="a MongoDB with a database in its path; else one is started")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of benchmarks.json and .png")
    given = parser.parse_args()
    console = Console()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, database(given.uri) as (uri, base):
        for name in ("vectors", "lists"):
            fill(base, name, given.docs, vectors=name == "vectors")
        fill(base, "clustered", given.docs, vectors=True, clustered=True)
        width = slow_width(contenders.BATCH)
        read = reading(base, given.rounds, lambda text: console.log(f"reading: {text}"))
        train = training(
            base, given.docs, given.rounds, Path(folder), lambda text: console.log(f"training: {text}")
        )
        slow = slow_steps(base, given.docs, width, given.rounds, lambda text: console.log(f"slow steps: {text}"))
        rows = list(ratio_rows(read, train, slow, step_seconds(width, contenders.BATCH)))
        if given.many:
            rows += scale_rows(uri, base, given.many, given.rounds, lambda text: console.log(f"scale: {text}"))
        rows += shape_rows(
            base, max(given.docs // _PART, 1), given.rounds, lambda text: console.log(f"shapes: {text}")
        )
        rows += sample_rows(
            base, max(given.docs // _PART, 1), given.rounds, lambda text: console.log(f"samples: {text}")
        )
        rows.append(publish_row(uri, base, given.rounds, lambda text: console.log(f"publish: {text}")))
    rates = {f"read: {name}": rate for name, rate in read.rates(given.docs).items()}
    rates |= {f"train: {name}": rate for name, rate in train.rates(given.docs).items()}
    show(rows, rates, console)
    machine = {"cores": os.cpu_count(), "load": os.getloadavg()[1], "platform": platform.platform()}
    settings = {"docs": given.docs, "many": given.many, "rounds": given.rounds, "torch": torch.__version__}
    content = {
        "when": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "settings": settings,
        "rows": [{**asdict(row), "met": row.met} for row in rows],
        "samples_per_second": rates,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "benchmarks.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    write_page(given.out / "benchmarks.md", rows, content)
    if not plot(rates, given.out / "benchmarks.png"):
        console.print("no plot: matplotlib is not installed")


if __name__ == "__main__":
    main()
