"""Bounds of about equal ranges of a large collection, without reading its index from end to end.

`$sample` picks documents by a random walk down a tree, which visits a part of a collection that grew unevenly far
too seldom: of a million documents inserted in one go it leaves ranges of 50,000 where there should be 1,000. Where
`_id`s ascend as documents were inserted, the server's record numbers say how many documents lie between two of
them; bounds are chosen by those, and the gaps that are still too wide are walked, for a limited time.

Always: bounds ascend and are inside of the select; the time is bounded, whatever the collection's size.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

from mongotorch.data.bsonorder import sort_key
from mongotorch.data.prefetch import in_order
from mongotorch.data.reader import Reader, Span

_SAMPLES = 8  # a range: with fewer the ranges differ too much in size
_SHARE = 0.04  # of a collection that is sampled at most: from 5 % on the server scans it all
_MOST = 100_000  # samples; each costs about 10 microseconds
_FEWEST = 8  # samples; with fewer the select is walked
_ASCENDING = 0.95  # of neighbours, for record numbers to mean something
_WIDE = 1.75  # times the wanted size, from where on a gap is walked
_WALK_S = 0.25  # seconds that walking may take


def sampled(reader: Reader, whole: Span, rows: int, size: int, *, most: int) -> tuple[Any, ...] | None:
    """The first `_id` of each range, ascending; None where too few documents of a sample match the select.

    Args:
        reader: Of the select.
        whole: All of the select.
        rows: Documents that a range should have.
        size: Documents of the collection.
        most: Ranges, at most.
    """
    rows = max(rows, -(-size // most))
    wanted = max(min(_SAMPLES * size // rows, int(size * _SHARE), _MOST), _FEWEST)
    ids = reader.sample(wanted)
    if len(ids) < _FEWEST:
        return None
    low, high = sort_key(whole.lower), sort_key(whole.upper)
    keyed = {sort_key(document_id): document_id for document_id in ids}
    inside = [whole.lower, *(keyed[key] for key in sorted(keyed) if low < key < high)]
    numbers = reader.record_numbers([*inside, whole.upper])
    gaps = [after - before for before, after in itertools.pairwise(numbers)]
    if not gaps or sum(gap > 0 for gap in gaps) < _ASCENDING * len(gaps):
        step = max(round(wanted * rows / size), 1)
        return tuple(inside[::step])
    # Record numbers count the documents of the collection, of which the select may have a part only.
    target = rows * wanted / len(ids)
    chosen, sizes = _evenly(inside, gaps, target)
    return tuple(_walked(reader, whole, chosen, sizes, target, rows))


def _evenly(ids: list[Any], gaps: list[int], target: float) -> tuple[list[Any], list[int]]:
    """The `_id`s that start ranges of about `target` documents, and how many lie behind each."""
    chosen: list[Any] = []
    sizes: list[int] = []
    for document_id, gap in zip(ids, gaps, strict=True):
        if not sizes or sizes[-1] >= target * 0.9:
            chosen.append(document_id)
            sizes.append(0)
        sizes[-1] += max(gap, 0)
    return chosen, sizes


def _walked(
    reader: Reader, whole: Span, starts: list[Any], sizes: list[int], target: float, rows: int
) -> Iterator[Any]:
    """The same starts, and more of them in wide gaps, the widest first as long as there is time."""
    wide = sorted((n for n, size in enumerate(sizes) if size > _WIDE * target), key=lambda n: -sizes[n])
    deadline = time.monotonic() + _WALK_S

    def more(n: int) -> tuple[int, list[Any]]:
        found: list[Any] = []
        if time.monotonic() < deadline:
            upper = starts[n + 1] if n + 1 < len(starts) else whole.upper
            span = Span(lower=starts[n], upper=upper, closed=False, uniform=whole.uniform)
            for start in reader.walk(span, rows):
                found.append(start)
                if time.monotonic() > deadline:
                    break
        return n, found

    results = in_order(more, iter(wide), threads=reader.threads, most=64, most_bytes=64, weigh=lambda _: 1)
    between = dict(results)
    for n, start in enumerate(starts):
        yield start
        yield from between.get(n, [])
