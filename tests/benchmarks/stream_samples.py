"""Batches that are made of samples, against a DataLoader over the same documents in memory with the same function.

Always: a document is a text of 32 words and a label; `tokenise` turns one into numbers, `padded` a batch of lists
into one tensor. The loader has the documents as Python objects before the clock starts.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tests.benchmarks.stream_contenders import BATCH, stream
from tests.benchmarks.stream_rounds import Rounds, drained
from tests.benchmarks.stream_show import Row
from torch import Tensor
from torch.utils.data import DataLoader

_WORDS, _CHUNK, _TARGET = 32, 10_000, 0.9


def tokenise(text: str, label: int) -> tuple[Tensor, int]:
    """A number for each word."""
    return torch.tensor([zlib.crc32(word.encode()) % 30_000 for word in text.split()]), label


def padded(samples: list[Any]) -> tuple[Tensor, Tensor]:
    """Lists of different lengths as one tensor, with zeros behind."""
    longest = max(len(ids) for ids, _ in samples)
    rows = [ids + [0] * (longest - len(ids)) for ids, _ in samples]
    return torch.tensor(rows), torch.tensor([label for _, label in samples])


class _Tokenised(list[Any]):
    """Documents in memory that are tokenised when they are asked for."""

    def __getitem__(self, number: Any) -> Any:
        return tokenise(*super().__getitem__(number))


def _fill(base: Any, count: int) -> tuple[list[Any], list[Any]]:
    """Two collections, and the samples of their documents."""
    draw = random.Random(0)
    texts = [" ".join(f"word{draw.randrange(5000)}" for _ in range(_WORDS)) for _ in range(count)]
    ids = [[draw.randrange(30_000) for _ in range(draw.randint(5, 60))] for _ in range(count)]
    found = []
    for name, values in (("samples of text", texts), ("samples of lists", ids)):
        base.drop_collection(name)
        for first in range(0, count, _CHUNK):
            part = values[first : first + _CHUNK]
            base[name].insert_many([{"x": x, "y": (first + n) % 10} for n, x in enumerate(part)])
        found.append([(x, n % 10) for n, x in enumerate(values)])
    return found[0], found[1]


def sample_rows(base: Any, count: int, rounds: int, say: Callable[[str], object]) -> Iterator[Row]:
    """The rows about `transform` and `collate_fn`."""
    texts, lists = _fill(base, count)
    contenders: dict[str, Callable[[], object]] = {}
    for workers in (0, 1):
        options = {"num_workers": workers, "persistent_workers": bool(workers)}
        own: dict[str, Any] = {"loader": options} if workers else {}
        loader: DataLoader[Any] = DataLoader(_Tokenised(texts), batch_size=BATCH, shuffle=True, **options)  # type: ignore[arg-type]
        other: DataLoader[Any] = DataLoader(
            lists,  # type: ignore[arg-type]
            batch_size=BATCH,
            shuffle=True,
            collate_fn=padded,
            **options,  # type: ignore[arg-type]
        )
        contenders[f"transform, {workers} workers"] = drained(
            stream(base, "samples of text", transform=tokenise, **own).__iter__
        )
        contenders[f"collate_fn, {workers} workers"] = drained(
            stream(base, "samples of lists", collate_fn=padded, **own).__iter__
        )
        contenders[f"transform, {workers} workers, in memory"] = drained(loader.__iter__)
        contenders[f"collate_fn, {workers} workers, in memory"] = drained(other.__iter__)
    measured = Rounds(contenders).run(rounds, say)
    for what, workers in itertools.product(("transform", "collate_fn"), (0, 1)):
        name = f"{what}, {workers} workers"
        target = _TARGET if what == "transform" else None
        yield Row(
            what=f"{name}, over DataLoader(in memory)",
            value=measured.speed(name, f"{name}, in memory"),
            target=target,
            note=f"{measured.rates(count)[name]:,.0f} a second, of {count:,}",
        )
