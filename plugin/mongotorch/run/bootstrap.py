"""How sure a difference of means is, from the differences of single documents.

Always: the same numbers give the same interval, on any machine; memory is bounded whatever their number.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.float64]

RESAMPLES = 10_000
_MOST_DRAWN = 2**22  # at a time: 16 MiB of indices, 32 MiB of values
_SEED = 0


def interval_of_mean(differences: Losses, confidence: float) -> tuple[float, float]:
    """The percentile interval of a mean by the bootstrap, 10,000 resamples with replacement.

    Takes about a second for every 10,000 differences. A single one has no interval: it is -inf to inf.

    Args:
        differences: One number a document, finite.
        confidence: Between 0 and 1: which share of the resampled means lies within.

    Source: B. Efron, R. J. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile intervals).
    """
    number = len(differences)
    if number < 2:
        return -np.inf, np.inf
    generator = np.random.default_rng(_SEED)
    rows = max(1, min(RESAMPLES, _MOST_DRAWN // number))
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, rows):
        size = (min(rows, RESAMPLES - start), number)
        means[start : start + rows] = differences[generator.integers(0, number, size, dtype=np.uint32)].mean(
            axis=1
        )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
