"""Rows in the order of the epoch, and the batches that are made of them.

Always: rows are ordered once a window and then only sliced; a batch is made from whole tensors where every
value of a field is alike, and value by value only where they are not; nothing here knows where rows come
from.

Memory for the tensors of a window: whole mappings of their own, given back as soon as nobody looks at them.

`malloc` learns from each large block that is freed: after the first window it keeps blocks of that size in its
heaps, where they fall to pieces between smaller ones, and the process grows with every few windows. It also hands
them out in pages of 4 KB, each of which the kernel has to fault in while rows are scattered over them.

Always: a buffer is fresh, writable, and freed with its last tensor.
"""

from __future__ import annotations

import abc
import contextlib
import math
import mmap
from collections.abc import Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mongotorch.codecs.arrays import BFLOAT16
from mongotorch.data.decode.column import Column, build, merge
from mongotorch.data.decode.decoder import Columns
from mongotorch.data.stream.position import RowMarkers
from mongotorch.tensors import from_array


def column_tensor(columns: Columns, path: str) -> Tensor | None:
    """The tensor of a column, shape (n, ...), or None where its values are not all alike."""
    column = columns[path]
    values = column.numbers()
    if values is None:
        return None
    # Integers among doubles are a list to the column, and numbers all the same.
    tensor = from_array(values, plain=column.plain or isinstance(column.data, list))
    return tensor.view(torch.bfloat16) if column.dtype == BFLOAT16 else tensor


def ordered(blocks: list[Columns], order: npt.NDArray[np.int64] | None, *, owned: bool) -> Rows:
    """The rows of blocks, in an order; `owned` where the blocks serve nobody else."""
    columns = blocks[0] if len(blocks) == 1 else Columns.concat(blocks)
    if order is None:
        return ColumnRows(columns.owned(), owned=owned)
    return ColumnRows(columns.take(order), owned=True)


def gathered(blocks: list[Columns], order: npt.NDArray[np.int64] | None) -> Rows:
    """The rows of blocks that serve nobody else, in an order: as tensors where all fields are alike."""
    layouts = {layout(block) for block in blocks}
    if len(layouts) > 1 or None in layouts:
        return ordered(blocks, order, owned=True)
    ids = merge([(None, block.ids) for block in blocks], identity=True)
    if len(blocks) == 1 and order is None:
        return TensorRows({path: _tensor(blocks[0], path) for path in blocks[0].paths}, ids, None)
    # Each row goes to its place at once: joining blocks first would copy, and hold, all of them twice.
    places = torch.empty(len(ids), dtype=torch.int64)
    rows = torch.arange(len(ids)) if order is None else torch.from_numpy(order)
    places[rows] = torch.arange(len(ids))
    tensors = {path: _scattered(blocks, path, places) for path in blocks[0].paths}
    return TensorRows(tensors, ids, order)


def _scattered(blocks: list[Columns], path: str, places: Tensor) -> Tensor:
    first = _tensor(blocks[0].slice(0, 1), path)
    whole = fresh((len(places), *first.shape[1:]), first.dtype)
    target = _items(whole.view(torch.uint8).numpy()) if first[0].numel() else None
    for block, part in zip(blocks, torch.split(places, [len(block) for block in blocks]), strict=True):
        values = block[path].array()
        if target is not None and values is not None and not block.plain(path) and values.dtype.isnative:
            target[part.numpy()] = _items(values)
        else:
            whole.index_copy_(0, part, _tensor(block, path))
    return whole


def _items(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Each row as one item of so many bytes, which is copied at once; a view, for rows that are contiguous."""
    octets = values.reshape(len(values), -1).view(np.uint8)
    return octets.view(np.dtype((np.void, octets.shape[1])))[:, 0]


def _tensor(block: Columns, path: str) -> Tensor:
    tensor = column_tensor(block, path)
    assert tensor is not None  # noqa: S101 - for the type checker; `layout` saw it
    return tensor


def layout(block: Columns) -> tuple[Any, ...] | None:
    """What must be the same in all blocks of a table; None where a field is no tensor."""
    arrays = [block[path].array() for path in block.paths]
    forms = [(block[path].kind, block[path].dtype) for path in block.paths]
    if any(array is None for array in arrays):
        return None
    return tuple((*form, a.shape[1:]) for form, a in zip(forms, arrays, strict=True) if a is not None)


class Rows(abc.ABC):
    """The rows of one window, in order.

    Attributes:
        marks: What is remembered of a row to find the place behind it again; None counts rows instead.
    """

    marks: RowMarkers | None = None

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
class CachedRows(Rows):
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


_LEAST = 2**20  # bytes; less than that is well kept by malloc


def fresh(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor whose values are not set yet."""
    size = math.prod(shape) * dtype.itemsize
    if size < _LEAST or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(tuple(shape), dtype=dtype)
    mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapped, dtype=dtype).view(tuple(shape))
