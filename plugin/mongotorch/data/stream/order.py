"""The order of an epoch, as a pure function of (number of ranges, seed, epoch) and the rows' own keys.

Always: nothing here depends on time, process, library version or on how the rows were read: every number
comes from splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"), written out
below, because numpy does not promise its generators' streams across versions. Each index occurs exactly once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from mongotorch.data.decode.ids import U64, mix, salt

_RANGES, _ROWS = 0x52414E474553, 0x524F5753  # "RANGES", "ROWS": two independent streams


def worker_seed(seed: int, epoch: int) -> int:
    """What torch's workers are seeded with in an epoch; below 2**63."""
    return int(salt(seed, epoch) >> np.uint64(1))


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

    def pieces(self, count: int | None, start: int = 0) -> Iterator[npt.NDArray[np.int64]]:
        """The windows from window `start` on where blocks cannot be permuted; endless without a count."""
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

    def rows(self, keys: U64) -> tuple[npt.NDArray[np.int64], U64]:
        """The permutation of a shuffled window's rows by their keys, and what the rows are then sorted by.

        A row's place depends on its own key only, so a row that is gone does not move the others.

        Args:
            keys: uint64 of shape (rows,).
        """
        ranks = mix(keys ^ salt(_ROWS, self.seed, self.epoch))
        order = np.argsort(ranks)
        placed = ranks[order]
        if (placed[1:] == placed[:-1]).any():  # the faster sort leaves open which of two equals is first
            order = np.argsort(ranks, kind="stable")
        return order.astype(np.int64, copy=False), placed
