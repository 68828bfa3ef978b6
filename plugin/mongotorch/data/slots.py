"""One value's place in documents of one layout, and how it is read from many of them at once.

Always: what is read may be kept and is never written to. It is the column's own, but for an array that is at
least half of its documents: that is a view of them, so that a large value is copied once, to where it is used.
What has no fixed form is cut out as a small document of its own and decoded by `bson`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Literal

import bson
import numpy as np
from numpy.typing import NDArray

from mongotorch.data.arrayvalues import restore
from mongotorch.data.column import Column, build

Bytes = NDArray[np.uint8]

_DATE_RANGE = (-62_135_596_800_000, 253_402_300_799_999)  # years 1 to 9999: what Python can say


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where one value lies, and how it is read.

    Attributes:
        form: `number`, `array`, `date`, `oid` at a fixed offset, `list` (numbers among their keys), `null`,
            or `opaque` (a whole element, from its type byte).
        start: Offset of the first byte in the document.
        stop: Offset after the last byte.
        dtype: The type of the numbers as stored.
        shape: The shape of an array.
        name: The dtype name of an array; the field's own name for an opaque element.
        runs: For a list: (offset, first index, count, stride) of each run of keys of one width.
    """

    form: Literal["number", "array", "date", "oid", "list", "null", "opaque"]
    start: int
    stop: int
    dtype: np.dtype[Any] | None = None
    shape: tuple[int, ...] = ()
    name: str = ""
    runs: tuple[tuple[int, int, int, int], ...] = ()

    def read(self, rows: Bytes, *, identity: bool) -> Column:
        """The values in rows, an (n, length) array of documents.

        Args:
            rows: Contiguous documents that all have the layout of this slot.
            identity: These are `_id`s: kept as `bson.decode` gives them.
        """
        if self.form == "null":
            return build([None] * len(rows))
        if self.form == "opaque":
            return self._opaque(rows, identity=identity)
        if self.form == "list":
            return self._list(rows)
        if self.form == "number":
            return _number(self._strided(rows, self.start))
        if self.form == "array":
            return self._array(rows)
        data = rows[:, self.start : self.stop].copy()
        if self.form == "oid":
            return Column(kind="oid", data=data, dtype="uint8")
        return self._dates(rows, data.view("<i8")[:, 0], identity=identity)

    def _strided(self, rows: Bytes, offset: int, *runs: tuple[int, int]) -> NDArray[Any]:
        """Numbers where they lie: one a row, or (count, stride) of them."""
        shape = (len(rows), *(count for count, _ in runs))
        strides = (rows.strides[0], *(stride for _, stride in runs))
        return np.ndarray(shape, self.dtype, rows.data, offset, strides)

    def _list(self, rows: Bytes) -> Column:
        _, first, count, _ = self.runs[-1]
        data = np.empty((len(rows), first + count), self.dtype)
        for offset, begin, size, stride in self.runs:
            data[:, begin : begin + size] = self._strided(rows, offset, (size, stride))
        return _number(data)

    def _array(self, rows: Bytes) -> Column:
        data = rows[:, self.start : self.stop]
        if data.shape[1] * 2 < rows.shape[1]:
            data = data.copy()
        shape = (len(rows), *self.shape)
        shaped = data.view(np.dtype(self.dtype)).reshape(shape) if data.size else np.empty(shape, self.dtype)
        return Column(kind="array", data=shaped, dtype=self.name)

    def _dates(self, rows: Bytes, data: NDArray[np.int64], *, identity: bool) -> Column:
        if _DATE_RANGE[0] <= data.min() and data.max() <= _DATE_RANGE[1]:
            return Column(kind="date", data=data, dtype="int64")
        element = self.start - len(self.name.encode()) - 2
        opaque = Slot(form="opaque", start=element, stop=self.stop, name=self.name)
        return opaque.read(rows, identity=identity)

    def _opaque(self, rows: Bytes, *, identity: bool) -> Column:
        """Decode an element alone: cut out of each row as a document with this one field."""
        size = self.stop - self.start + 5
        cut = np.zeros((len(rows), size), np.uint8)
        cut[:, :4] = np.frombuffer(struct.pack("<i", size), np.uint8)
        cut[:, 4:-1] = rows[:, self.start : self.stop]
        found = [document[self.name] for document in bson.decode_all(cut.tobytes())]
        return build(found if identity else [restore(value) for value in found], identity=identity)


def _number(data: NDArray[Any]) -> Column:
    wide = np.dtype(np.bool_ if data.dtype.itemsize == 1 else np.int64 if data.dtype.kind == "i" else np.float64)
    owned = data.astype(wide, copy=data.base is not None)
    return Column(kind="number", data=owned, dtype=wide.name)
