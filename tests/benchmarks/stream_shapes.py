"""The stream over documents of every usual shape, against a raw drain of them and a naive loop.

    python -m tests.benchmarks.stream_shapes --docs 50000 --only text bytes

Always: the raw drain is `find_raw_batches(batch_size=1000)` of the same fields by `_id`; the naive loop is a
cursor that makes the same batches of the documents; the stream is shuffled. Contenders of a shape take turns.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from bson import Binary
from tests.benchmarks.stream_contenders import BATCH, stream
from tests.benchmarks.stream_data import database
from tests.benchmarks.stream_show import Row

from mongotorch.codecs.arrays import decode_document
from mongotorch.signature import Key
from mongotorch.tensors import collate

_WIDE = tuple(f"f{n}" for n in range(50))
_CHUNK = 10_000


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Documents of one shape, and how they become batches.

    Attributes:
        name: Of the shape, and of its collection.
        make: The fields of a document, from two generators of random numbers.
        key: The fields that are read.
        target: The stream's speed over that of the raw drain.
        given: Options of the stream, for what is no tensor.
    """

    name: str
    make: Callable[[random.Random, np.random.Generator], dict[str, Any]]
    target: float
    key: tuple[str, ...] = ("x", "y")
    given: dict[str, Any] = field(default_factory=dict)


def _mixed(value: float) -> float | int:
    """What JSON makes of some numbers: an integer."""
    return int(value) if value > 1 else float(value)


def texts(samples: list[Any]) -> Any:
    """The texts as they are, and the labels as a tensor."""
    return [text for text, _ in samples], torch.tensor([label for _, label in samples])


def buffers(samples: list[Any]) -> Any:
    """A tensor of bytes a document, and the labels as a tensor."""
    rows = [torch.from_numpy(np.frombuffer(value, np.uint8).copy()) for value, _ in samples]
    return rows, torch.tensor([label for _, label in samples])


def bags(samples: list[Any]) -> Any:
    """All numbers, how many a document has, and the labels: what an embedding bag takes."""
    return (
        torch.from_numpy(np.fromiter(itertools.chain.from_iterable(value for value, _ in samples), np.int64)),
        torch.tensor([len(value) for value, _ in samples]),
        torch.tensor([label for _, label in samples]),
    )


def _floats(draw: np.random.Generator, *shape: int) -> Any:
    return draw.standard_normal(shape).tolist()


SHAPES = (
    Shape(
        name="vectors",
        make=lambda _, draw: {"x": Binary(b"\x27\0" + draw.standard_normal(64, np.float32).tobytes(), 9)},
        target=0.85,
    ),
    Shape(name="lists", make=lambda _, draw: {"x": _floats(draw, 64)}, target=0.85),
    Shape(
        name="wide doubles",
        make=lambda _, draw: dict(zip(_WIDE, _floats(draw, 50), strict=True)),
        target=0.7,
        key=(*_WIDE, "y"),
    ),
    Shape(
        name="wide mixed",
        make=lambda _, draw: dict(zip(_WIDE, map(_mixed, _floats(draw, 50)), strict=True)),
        target=0.6,
        key=(*_WIDE, "y"),
    ),
    Shape(name="list mixed", make=lambda _, draw: {"x": list(map(_mixed, _floats(draw, 64)))}, target=0.6),
    Shape(
        name="ragged integers",
        make=lambda one, draw: {"x": draw.integers(0, 30_000, one.randint(5, 60)).tolist()},
        target=0.6,
        given={"collate_fn": bags},
    ),
    Shape(
        name="text",
        make=lambda one, _: {"x": " ".join(f"word{one.randrange(5000)}" for _ in range(one.randint(5, 60)))},
        target=0.6,
        given={"collate_fn": texts},
    ),
    Shape(
        name="bytes",
        make=lambda one, _: {"x": one.randbytes(one.randint(200, 2000))},
        target=0.7,
        given={"collate_fn": buffers},
    ),
    Shape(
        name="images",
        make=lambda one, _: {"x": {"dtype": "uint8", "shape": [3, 32, 32], "data": one.randbytes(3072)}},
        target=0.8,
    ),
    Shape(name="nested lists", make=lambda _, draw: {"x": _floats(draw, 8, 16)}, target=0.7),
    Shape(
        name="nested fields",
        make=lambda _, draw: {"a": {"b": draw.standard_normal(), "c": {"d": _floats(draw, 32)}}},
        target=0.7,
        key=("a.b", "a.c.d", "y"),
    ),
)


def fill(base: Any, shape: Shape, count: int) -> None:
    """The collection of a shape, unless it is there already."""
    if base[shape.name].estimated_document_count() == count:
        return
    base.drop_collection(shape.name)
    one, draw = random.Random(0), np.random.default_rng(0)
    for first in range(0, count, _CHUNK):
        rows = range(first, min(first + _CHUNK, count))
        base[shape.name].insert_many([{**shape.make(one, draw), "y": row % 10} for row in rows], ordered=False)


def raw(base: Any, shape: Shape) -> Iterator[Any]:
    """Raw BSON of the same fields."""
    projection = Key.parse(shape.key).projection
    return iter(base[shape.name].find_raw_batches({}, projection, sort=[("_id", 1)], batch_size=1000))


def naive(base: Any, shape: Shape) -> Iterator[Any]:
    """The same batches, made of decoded documents."""
    key = Key.parse(shape.key)
    together = shape.given.get("collate_fn", collate)
    samples: list[Any] = []
    for document in base[shape.name].find({}, key.projection, batch_size=1000):
        found = decode_document(document) if shape.name in ("vectors", "images") else document
        samples.append(tuple(_value(found, path) for path in key.paths))
        if len(samples) == BATCH:
            yield together(samples)
            samples = []
    if samples:
        yield together(samples)


def _value(document: Any, path: str) -> Any:
    for name in path.split("."):
        document = document[name]
    return document


def seconds(batches: Iterator[Any]) -> float:
    """How long it takes to go through all of them."""
    start = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - start


def ratios(base: Any, shape: Shape, count: int, rounds: int) -> tuple[float, float, float]:
    """Documents a second of the stream, and its speed over that of the raw drain and of the naive loop."""
    fill(base, shape, count)
    made = stream(base, shape.name, key=shape.key, **shape.given)
    taken: dict[str, list[float]] = {"stream": [], "raw": [], "naive": []}
    try:
        seconds(iter(made))  # makes the plan
        for _ in range(rounds):
            taken["raw"].append(seconds(raw(base, shape)))
            taken["stream"].append(seconds(iter(made)))
            taken["naive"].append(seconds(naive(base, shape)))
    finally:
        made.close()
    own = taken["stream"]
    over = [
        statistics.median(other / mine for other, mine in zip(taken[name], own, strict=True))
        for name in ("raw", "naive")
    ]
    return count / statistics.median(own), over[0], over[1]


def shape_rows(base: Any, count: int, rounds: int, say: Callable[[str], object]) -> Iterator[Row]:
    """The rows about the shapes of documents."""
    for shape in SHAPES:
        speed, over_raw, over_naive = ratios(base, shape, count, rounds)
        note = f"{speed:,.0f} a second, of {count:,}"
        yield Row(what=f"{shape.name}, over raw drain", value=over_raw, target=shape.target, note=note)
        yield Row(what=f"{shape.name}, over naive loop", value=over_naive, target=1)
        say(shape.name)


def main() -> None:
    """Measure what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--uri")
    parser.add_argument("--only", nargs="*", help="names of shapes")
    given = parser.parse_args()
    with database(given.uri) as (_, base):
        for shape in SHAPES:
            if not given.only or shape.name in given.only:
                speed, over_raw, over_naive = ratios(base, shape, given.docs, given.rounds)
                print(
                    f"{shape.name:16s} {speed:10,.0f} documents/s  {over_raw:5.2f} of a raw drain (target"
                    f" {shape.target})  {over_naive:5.1f} x a naive loop",
                    flush=True,
                )


if __name__ == "__main__":
    main()
