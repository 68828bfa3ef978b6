"""The order of an epoch: which ranges make up each window, and in which order the rows of a window come.

It is a pure function of (number of ranges, seed, epoch) and of the rows' own keys and weights. Every number comes
from splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"), because numpy does not
promise its generators' streams across versions.

Guarantees: nothing depends on time, process, library version or on how the rows were read; each range occurs in
exactly one window of an epoch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt

from mongotorch.data.decode import U64, mix, salt

_RANGES, _ROWS, _LANES = 0x52414E474553, 0x524F5753, 0x4C414E4553  # "RANGES", …: independent streams
_TIMES, _AGAIN = 0x54494D4553, 0x414741494E

ROW_WEIGHT: Final = np.dtype([("key", "<u8"), ("weight", "<f8")])
"""Of a row: what decides how often it comes, and how many times it is expected in an epoch."""


def row_weights(keys: U64, weights: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    """The weights of some rows and their keys, (rows,) of `ROW_WEIGHT`."""
    found = np.empty(len(keys), ROW_WEIGHT)
    found["key"], found["weight"] = keys, weights
    return found


def position_keys(first: int, count: int) -> U64:
    """The keys of rows that have no better one than where they are in their query; uint64 of shape (count,)."""
    return mix(np.arange(first, first + count, dtype=np.uint64))


def worker_seed(seed: int, epoch: int) -> int:
    """What torch's workers are seeded with in an epoch; below 2**63."""
    return int(salt(seed, epoch) >> np.uint64(1))


def lane_seed(seed: int, epoch: int, step: int, lane: int) -> int:
    """Where generators start for the samples of one lane of a step; below 2**63."""
    return int(salt(_LANES, seed, epoch, step, lane) >> np.uint64(1))


@final
@dataclass(frozen=True, kw_only=True)
class WindowSpec:
    """A window to read.

    Attributes:
        order: Of its epoch.
        number: Which window of the epoch, from 0.
        ranges: The numbers of its ranges.
        last: Whether it ends its epoch; False as well where that is not known.
        size: What it counts, in ranges, against the bound of two windows for what is read ahead. An epoch counts
            that much at least, so that a small one is not read before the one before it is served.
    """

    order: Order
    number: int
    ranges: list[int]
    last: bool
    size: int


@final
@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of one epoch.

    Attributes:
        seed: Any integer.
        epoch: The epoch, from 0.
        shuffle: False is the natural order.
        window: How many ranges are shuffled together, at least 1.
    """

    seed: int
    epoch: int
    shuffle: bool
    window: int

    def consecutive(self, count: int | None, start: int = 0) -> Iterator[npt.NDArray[np.int64]]:
        """The ranges of each window from `start` on, where they cannot be permuted; endless without a count."""
        size = self.window if self.shuffle else 1
        for first in itertools.count(start * size, size):
            if count is not None and first >= count:
                return
            yield np.arange(first, first + size if count is None else min(first + size, count), dtype=np.int64)

    def windows(self, ranges: int, start: int = 0) -> Iterator[npt.NDArray[np.int64]]:
        """The ranges of each window from window `start` on; inside a window they ascend.

        They ascend so that equal row hashes are decided by `_id`, see `rows`.
        """
        if not self.shuffle:
            yield from (np.array([index], dtype=np.int64) for index in range(start, ranges))
            return
        hashes = mix(np.arange(ranges, dtype=np.uint64) ^ salt(_RANGES, self.seed, self.epoch))
        permuted = np.argsort(hashes, kind="stable").astype(np.int64)
        first = sum(self._size(window) for window in range(start))
        for window in itertools.count(start):
            if first >= ranges:
                return
            size = self._size(window)
            yield np.sort(permuted[first : first + size])
            first += size

    def _size(self, window: int) -> int:
        """How many ranges a window has: the first two are smaller, so that the first batch need not wait long."""
        return max(self.window >> (2 - window), 1) if window < 2 else self.window

    def specs(self, windows: Iterator[npt.NDArray[np.int64]], start: int) -> Iterator[WindowSpec]:
        """The windows of this epoch, numbered from `start` on, as something that can be read."""
        before = 0
        following = next(windows, None)
        for number in itertools.count(start):
            if following is None:
                return
            ranges, following = following.tolist(), next(windows, None)
            size, last = len(ranges), following is None
            yield WindowSpec(
                order=self,
                number=number,
                ranges=ranges,
                last=last,
                size=max(size, 2 * self.window - before) if last else size,
            )
            before += size

    def times(self, weights: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """How many times each row comes in this epoch; int64 of shape (rows,).

        The whole part of a weight always, and once more as often as the rest of it says.

        Args:
            weights: `ROW_WEIGHT` of shape (rows,).
        """
        draws = (mix(weights["key"] ^ salt(_TIMES, self.seed, self.epoch)) >> np.uint64(11)) * 2.0**-53
        whole = np.floor(weights["weight"])
        times: npt.NDArray[np.int64] = whole.astype(np.int64) + (draws < weights["weight"] - whole)
        return times

    def arranged(
        self, keys: list[U64], weights: list[npt.NDArray[Any]] | None
    ) -> tuple[npt.NDArray[np.int64] | None, U64 | None]:
        """The rows of a window in the order of the epoch, and the hashes that they are then sorted by.

        Args:
            keys: Those of the rows of each range.
            weights: `ROW_WEIGHT` of the same rows; None lets each row come once.

        Returns:
            Positions of rows, None where they are as they are; and hashes, None where nothing is shuffled.
        """
        if weights is None:
            return self.rows(np.concatenate(keys)) if self.shuffle else (None, None)
        times = self.times(np.concatenate(weights))
        rows = np.repeat(np.arange(len(times)), times)
        if not self.shuffle:
            return rows, None
        again = np.arange(len(rows)) - np.repeat(np.cumsum(times) - times, times)
        repeated = np.concatenate(keys)[rows]
        # A row that comes again lies elsewhere in the window.
        copies = mix(repeated ^ mix(again.astype(np.uint64) ^ np.uint64(_AGAIN)))
        permutation, hashes = self.rows(np.where(again > 0, copies, repeated))
        return rows[permutation], hashes

    def rows(self, keys: U64) -> tuple[npt.NDArray[np.int64], U64]:
        """The permutation of a shuffled window's rows by their keys, and the hashes that they are then sorted by.

        The hash of a row depends on its own key only, so a row that is gone does not move the others.

        Args:
            keys: uint64 of shape (rows,).
        """
        hashes = mix(keys ^ salt(_ROWS, self.seed, self.epoch))
        order = np.argsort(hashes)
        ascending = hashes[order]
        if (ascending[1:] == ascending[:-1]).any():  # the faster sort leaves open which of two equals is first
            order = np.argsort(hashes, kind="stable")
        return order.astype(np.int64, copy=False), ascending


@final
@dataclass(frozen=True, kw_only=True)
class Share:
    """Which rows of an epoch a shard has, by how many rows lie before them.

    Attributes:
        period: Rows after which it is the same again: those of a step, or of a round of batches.
        first: The first of its rows in a period.
        stop: The row behind the last one.
        is_cut_anew: Whether the rows of a last period that is not full are dealt out in another way.
    """

    period: int
    first: int
    stop: int
    is_cut_anew: bool

    def rows(self, before: int, count: int) -> npt.NDArray[np.bool_]:
        """Which of so many rows, with so many before them, it may need; (count,) bool.

        Those of a period that they do not complete are all needed: nobody knows yet whether it will be full.
        """
        numbers = np.arange(before, before + count)
        at = numbers % self.period
        mine: npt.NDArray[np.bool_] = (at >= self.first) & (at < self.stop)
        if self.is_cut_anew:
            mine |= numbers >= (before + count) // self.period * self.period
        return mine

    def saved(self, rows: int) -> float:
        """About which part of the documents of a window of so many rows it need not read."""
        others = 1 - (self.stop - self.first) / self.period
        return others * max(1 - self.period / 2 / rows, 0.0) if self.is_cut_anew else others


def requests(specs: Iterator[WindowSpec], most: int) -> Iterator[list[WindowSpec]]:
    """The windows as what a worker is given at a time.

    The last window of an epoch and the first ones of the next are small: they go together, so that they last as
    long as reading what follows. Those of the very first epoch go alone, because the first batch waits for them.

    Args:
        specs: The windows.
        most: The size that windows have together at most; a single one may be larger.
    """
    request: list[WindowSpec] = []
    first: Order | None = None
    for spec in specs:
        first = first or spec.order
        joins = spec.order != first and sum(one.size for one in request) + spec.size <= most
        if request and not joins:
            yield request
            request = []
        request.append(spec)
    if request:
        yield request
