"""Concatenated BSON documents as two-dimensional arrays of bytes, one for each length that is frequent.

Always: each document is in exactly one group or among the rest, with its position in the input.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mongotorch.data.slots import Bytes
from mongotorch.errors import DataError

Rows = NDArray[np.intp]
Group = tuple[Rows | None, Bytes]  # positions of the rows (None: all, in order) and the rows

_SMALLEST_DOCUMENT = 5


def by_length(content: bytes | memoryview, smallest: int, most: int) -> tuple[list[Group], tuple[Rows, bytes]]:
    """The documents as groups of one length, and those of rare lengths as they are."""
    octets = np.frombuffer(content, np.uint8)
    length = _length_at(content, 0) if content else 1
    if len(content) % length == 0:
        matrix = octets.reshape(-1, length)
        if (matrix[:, :4] == matrix[:1, :4]).all():
            return ([(None, matrix)] if content else []), (np.empty(0, np.intp), b"")
    offsets = np.array(list(_walk(content)), np.intp)
    lengths = np.diff(offsets, append=len(content))
    sizes, counts = np.unique(lengths, return_counts=True)
    common = sizes[np.argsort(-counts, kind="stable")[:most]][: np.count_nonzero(counts >= smallest)]
    groups: list[Group] = []
    for size in common.tolist():
        rows = np.flatnonzero(lengths == size)
        # A window at every byte: indexing it copies whole documents, not single bytes.
        windows: NDArray[Any] = np.ndarray((len(content) - size + 1,), np.dtype((np.void, size)), content, 0, (1,))
        groups.append((rows, windows[offsets[rows]].view(np.uint8).reshape(-1, size)))
    rare = np.flatnonzero(~np.isin(lengths, common))
    spans = zip(offsets[rare].tolist(), lengths[rare].tolist(), strict=True)
    return groups, (rare, b"".join([content[start : start + size] for start, size in spans]))


def _walk(content: bytes | memoryview) -> Iterator[int]:
    at = 0
    while at < len(content):
        yield at
        at += _length_at(content, at)


def _length_at(content: bytes | memoryview, at: int) -> int:
    length = int(struct.unpack_from("<i", content, at)[0])
    if length < _SMALLEST_DOCUMENT or at + length > len(content):
        raise DataError("documents that are not valid BSON: one is longer or shorter than it says")
    return length
