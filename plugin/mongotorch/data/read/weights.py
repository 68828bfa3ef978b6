"""Reads the weights of documents: how many times each of them is expected in an epoch.

A weight is a field of the document, a number from 0 to `MOST`. What it means for one epoch is for the stream to
decide: a weight of 2.3 is two rows, and a third one in three epochs of ten.

Guarantees: what is no weight is named, or left out; a weight does not depend on what else was read with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from bson import Decimal128

from mongotorch.data.decode import Columns
from mongotorch.errors import DataError

MOST: Final = 1000
"""The largest weight: beyond it a weight is a value of another kind, such as a price or a count."""


def weights_of(columns: Columns, path: str) -> npt.NDArray[np.float64]:
    """The weights of some rows, (rows,).

    Args:
        columns: The rows; the column of the weight is among their fields.
        path: The field.

    Raises:
        DataError: A value that is no weight; `document_id` names the first document.
    """
    values = _numbers(columns, path)
    for row, reason in _unusable(columns, path, values):
        raise DataError(reason, field=path, document_id=columns.ids[row])
    return values


def with_weights(columns: Columns, path: str) -> Columns:
    """The rows that have a weight; `skipped` and `why` say what was left out, now and before."""
    unusable = dict(_unusable(columns, path, _numbers(columns, path)))
    if not unusable:
        return columns
    left = columns.take(np.setdiff1d(np.arange(len(columns)), list(unusable)))
    why = columns.why or next(iter(unusable.values()))
    return replace(left, skipped=columns.skipped + len(unusable), why=why)


def _numbers(columns: Columns, path: str) -> npt.NDArray[np.float64]:
    """The values of a field, NaN for what is no number; (rows,)."""
    values = columns.fields[path].numbers()
    if values is not None and values.ndim == 1:
        return values.astype(np.float64)
    return np.array([_number(value) for value in columns.fields[path].values()], np.float64)


def _number(value: Any) -> float:
    if isinstance(value, Decimal128):
        value = value.to_decimal()
        return float("nan") if value.is_nan() else float(value)
    return float(value) if isinstance(value, bool | int | float) else float("nan")


def _unusable(columns: Columns, path: str, values: npt.NDArray[np.float64]) -> Iterator[tuple[int, str]]:
    """The rows whose value is no weight, and why."""
    fine = (values >= 0) & (values <= MOST)
    for row in [] if fine.all() else np.flatnonzero(~fine).tolist():
        shown = repr(columns.fields[path][row])
        yield (
            row,
            f"field {path!r} of document {columns.ids[row]!r} holds {shown[:80]}, which is no sample_weight: "
            f"how many times a document is expected in an epoch, from 0 to {MOST}; divide weights by their mean",
        )
