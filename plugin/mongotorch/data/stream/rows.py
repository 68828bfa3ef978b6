"""The rows of a window in the order of the epoch, as columns or as tensors that batches are slices of.

Rows are put in order once a window and then only sliced. A field is one tensor where its values are all alike, and
is stacked value by value only where they are not. Large tensors are whole memory mappings of their own (`fresh`):
`malloc` learns from each large allocation that is freed, after the first window keeps memory of that size in its
heaps, where it falls to pieces between smaller ones, and the process grows with every few windows. It also hands
it out in pages of 4 KB, each of which the kernel has to fault in while rows are scattered over them.

Guarantees: the memory of `fresh` is writable and freed with the last tensor that uses it.
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
from mongotorch.data.stream.position import HashMarkers, IdMarkers, RowMarkers
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


def ordered(parts: list[Columns], order: npt.NDArray[np.int64] | None, *, owned: bool) -> Rows:
    """The rows of ranges, in an order; `owned` where nobody else uses their columns."""
    columns = parts[0] if len(parts) == 1 else Columns.concat(parts)
    if order is None:
        return ColumnRows(columns.owned(), owned=owned)
    return ColumnRows(columns.take(order), owned=True)


def gathered(parts: list[Columns], order: npt.NDArray[np.int64] | None) -> Rows:
    """The rows of ranges that nobody else uses, in an order: as tensors where all fields are alike."""
    layouts = {layout(columns) for columns in parts}
    if len(layouts) > 1 or None in layouts:
        return ordered(parts, order, owned=True)
    ids = merge([(None, columns.ids) for columns in parts], identity=True)
    if len(parts) == 1 and order is None:
        return TensorRows({path: tensor_of(parts[0], path) for path in parts[0].paths}, ids, None)
    # Each row goes to where it belongs at once: joining ranges first would copy, and hold, all of them twice.
    targets = torch.empty(len(ids), dtype=torch.int64)
    rows = torch.arange(len(ids)) if order is None else torch.from_numpy(order)
    targets[rows] = torch.arange(len(ids))
    tensors = {path: _scattered(parts, path, targets) for path in parts[0].paths}
    return TensorRows(tensors, ids, order)


def _scattered(parts: list[Columns], path: str, targets: Tensor) -> Tensor:
    """A field of all ranges, the n-th row of them at `targets[n]`."""
    first = tensor_of(parts[0].slice(0, 1), path)
    whole = fresh((len(targets), *first.shape[1:]), first.dtype)
    items = _items(whole.view(torch.uint8).numpy()) if first[0].numel() else None
    for columns, rows in zip(parts, torch.split(targets, [len(columns) for columns in parts]), strict=True):
        values = columns[path].array()
        if items is not None and values is not None and not columns.plain(path) and values.dtype.isnative:
            items[rows.numpy()] = _items(values)
        else:
            whole.index_copy_(0, rows, tensor_of(columns, path))
    return whole


def _items(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Each row as one item of so many bytes, which is copied at once; a view, for rows that are contiguous."""
    octets = values.reshape(len(values), -1).view(np.uint8)
    return octets.view(np.dtype((np.void, octets.shape[1])))[:, 0]


def tensor_of(columns: Columns, path: str) -> Tensor:
    """The tensor of a column whose values are known to be alike, see `layout`."""
    tensor = column_tensor(columns, path)
    assert tensor is not None  # noqa: S101 - for the type checker; `layout` saw it
    return tensor


def layout(columns: Columns) -> tuple[Any, ...] | None:
    """What must be the same in all ranges that become one tensor a field; None where a field is no tensor."""
    arrays = [columns[path].array() for path in columns.paths]
    forms = [(columns[path].kind, columns[path].dtype) for path in columns.paths]
    if any(array is None for array in arrays):
        return None
    return tuple((*form, a.shape[1:]) for form, a in zip(forms, arrays, strict=True) if a is not None)


class Rows(abc.ABC):
    """The rows of one window, in order.

    Attributes:
        markers: What finds the row again that was yielded last; None counts rows instead.
    """

    markers: RowMarkers | None = None

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

    def mark(self, hashes: npt.NDArray[np.uint64] | None, ids: Column | None) -> None:
        """Let rows be found again by their hashes, else by their `_id`s; those given ascend, both may be None."""
        if hashes is not None:
            self.markers = HashMarkers(hashes)
        elif ids is not None:
            self.markers = IdMarkers(ids)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0


@final
class ColumnRows(Rows):
    """Rows that are columns of their own: tensors are made once a field and sliced."""

    def __init__(self, columns: Columns, *, owned: bool) -> None:
        self._columns = columns
        self._owned = owned  # else a batch is a copy, because the columns are used again
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
        order: Where in `ids` each row is; None is that very order.
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
    """Rows of cached tensors, by index."""

    def __init__(self, tensors: dict[str, Tensor], indices: npt.NDArray[np.int64]) -> None:
        self._tensors = tensors
        self.indices = torch.from_numpy(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def tensor(self, path: str, start: int, stop: int) -> Tensor | None:
        """See `Rows.tensor`; a copy."""
        return self._tensors[path].index_select(0, self.indices[start:stop])

    def columns(self, start: int, stop: int) -> Columns:
        """Never asked for: tensors are cached where no samples are built."""
        raise NotImplementedError(f"tensors have no columns ({start}:{stop})")


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
