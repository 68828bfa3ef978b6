"""Rows in the order of the epoch, and the batches that are made of them.

Always: rows are ordered once a window and then only sliced; a batch is made from whole tensors where every
value of a field is alike, and value by value only where they are not; nothing here knows where rows come
from.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mongotorch.data.column import Column, build
from mongotorch.data.columns import Columns
from mongotorch.data.marks import Marks
from mongotorch.data.tensors import column_tensor, join, stack
from mongotorch.key import Key


class Rows(abc.ABC):
    """The rows of one window, in order.

    Attributes:
        marks: What is remembered of a row to find the place behind it again; None counts rows instead.
    """

    marks: Marks | None = None

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def tensor(self, path: str, start: int, stop: int) -> Tensor | None:
        """A field of some rows, or None where it has to be stacked value by value."""

    @abc.abstractmethod
    def columns(self, start: int, stop: int) -> Columns:
        """The columns of some rows."""

    def ids(self, start: int, stop: int) -> list[Any]:
        """The `_id`s of some rows."""
        return self.columns(start, stop).ids.values()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0


@final
class ColumnRows(Rows):
    """Rows that are columns of their own: tensors are made once a field and sliced."""

    def __init__(self, columns: Columns, *, owned: bool) -> None:
        self._columns = columns
        self._owned = owned  # else a batch is a copy, because the columns serve again
        self._tensors: dict[str, Tensor | None] = {}

    def __len__(self) -> int:
        return len(self._columns)

    def tensor(self, path: str, start: int, stop: int) -> Tensor | None:
        """See `Rows.tensor`."""
        if path not in self._tensors:
            self._tensors[path] = column_tensor(self._columns, path)
        whole = self._tensors[path]
        if whole is None:
            return None
        return whole[start:stop] if self._owned else whole[start:stop].clone()

    def columns(self, start: int, stop: int) -> Columns:
        """See `Rows.columns`."""
        return self._columns.slice(start, stop)

    @property
    def nbytes(self) -> int:
        """See `Rows.nbytes`."""
        return self._columns.nbytes


@final
class TensorRows(Rows):
    """Rows whose fields are tensors already, in their order: batches are views of them.

    Args:
        tensors: Of each path, shape (rows, ...).
        ids: The `_id`s, in the order of reading.
        order: The place of each row in `ids`; None is that very order.
    """

    def __init__(self, tensors: dict[str, Tensor], ids: Column, order: npt.NDArray[np.int64] | None) -> None:
        self._tensors = tensors
        self._ids, self._order = ids, order

    def __len__(self) -> int:
        return len(self._ids)

    def tensor(self, path: str, start: int, stop: int) -> Tensor | None:
        """See `Rows.tensor`."""
        return self._tensors[path][start:stop]

    def columns(self, start: int, stop: int) -> Columns:
        """Never asked for: every field is a tensor, and no samples are built."""
        raise NotImplementedError(f"tensors have no columns ({start}:{stop})")

    def ids(self, start: int, stop: int) -> list[Any]:
        """See `Rows.ids`."""
        if self._order is None:
            return self._ids.slice(start, stop, identity=True).values()
        return self._ids.take(self._order[start:stop], identity=True).values()

    @property
    def nbytes(self) -> int:
        """See `Rows.nbytes`."""
        return self._ids.nbytes + sum(tensor.nbytes for tensor in self._tensors.values())


NO_ROWS = TensorRows({}, build([]), None)


@final
class TableRows(Rows):
    """Rows of a table of tensors, by index."""

    def __init__(self, tensors: dict[str, Tensor], indices: npt.NDArray[np.int64]) -> None:
        self._tensors = tensors
        self.indices = torch.from_numpy(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def tensor(self, path: str, start: int, stop: int) -> Tensor | None:
        """See `Rows.tensor`; a copy."""
        return self._tensors[path].index_select(0, self.indices[start:stop])

    def columns(self, start: int, stop: int) -> Columns:
        """Never asked for: a table is made where no samples are built."""
        raise NotImplementedError(f"a table has no columns ({start}:{stop})")


Piece = tuple[Rows, int, int]


def columns_of(pieces: list[Piece]) -> Columns:
    """The columns of a batch's rows."""
    parts = [rows.columns(start, stop) for rows, start, stop in pieces]
    return parts[0] if len(parts) == 1 else Columns.concat(parts)


def batch_of(pieces: list[Piece], key: Key) -> Any:
    """The batch in the structure of the key, each field a tensor of shape (n, ...).

    Raises:
        ShapeError: Shapes differ; `field` and `document_id` name where.
        DataError: A value has no tensor.
    """
    return key.arrange(_once(lambda path: _field(pieces, path)))


def _once(value: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    known: dict[str, Tensor] = {}
    return lambda path: known[path] if path in known else known.setdefault(path, value(path))


def _field(pieces: list[Piece], path: str) -> Tensor:
    tensors = [rows.tensor(path, start, stop) for rows, start, stop in pieces]
    found = [tensor for tensor in tensors if tensor is not None]
    if len(found) == len(tensors):
        return join(found, field=path)
    values: list[Any] = []
    ids: list[Any] = []
    for tensor, (rows, start, stop) in zip(tensors, pieces, strict=True):
        values.extend(rows.columns(start, stop)[path].values() if tensor is None else tensor.unbind())
        ids.extend(rows.ids(start, stop))
    return stack(values, field=path, ids=ids)
