"""All rows at once, in memory; `download` has them in memory-mapped files.

Always: what is held serves the same rows in the same order as reading them again would. Rows whose fields are
all alike become one table of tensors; others are kept as blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mongotorch.data.buffers import fresh
from mongotorch.data.column import Column, merge
from mongotorch.data.columns import Columns
from mongotorch.data.order import U64
from mongotorch.data.prefetch import close_iterator
from mongotorch.data.rows import ColumnRows, Rows, TableRows, TensorRows
from mongotorch.data.source import Source
from mongotorch.data.tensors import column_tensor


class BlockSequence(Protocol):
    """Blocks by number: a list, or files that decode them."""

    def __getitem__(self, index: int, /) -> Columns:
        """One block."""
        ...


class Held:
    """All rows of a source."""

    window: int
    count: int

    def __init__(self, keys: list[U64], ids: BlockSequence) -> None:
        self._keys = keys
        self._ids = ids
        self.count = len(keys)
        self._starts = np.cumsum([0, *map(len, keys)]).astype(np.int64)

    def keys(self, indices: Iterable[int]) -> U64:
        """The row keys of some blocks, one after the other."""
        return np.concatenate([self._keys[index] for index in indices])

    def ids(self, index: int) -> Column:
        """The `_id`s of a block."""
        return self._ids[index].ids

    def rows(self, indices: npt.NDArray[np.int64], order: npt.NDArray[np.int64] | None) -> Rows:
        """The rows of some blocks, in an order."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of files."""
        close = getattr(self._ids, "close", None)
        if close is not None:
            close()


@final
class Table(Held):
    """Rows as tensors."""

    def __init__(self, keys: list[U64], ids: BlockSequence, tensors: dict[str, Tensor]) -> None:
        super().__init__(keys, ids)
        self._tensors = tensors

    def rows(self, indices: npt.NDArray[np.int64], order: npt.NDArray[np.int64] | None) -> Rows:
        """See `Held.rows`."""
        spans = [np.arange(self._starts[i], self._starts[i + 1], dtype=np.int64) for i in indices]
        flat = np.concatenate(spans)
        return TableRows(self._tensors, flat if order is None else flat[order])


@final
class Blocks(Held):
    """Rows as blocks of columns, in memory or decoded from mapped BSON when asked for."""

    def __init__(self, keys: list[U64], blocks: BlockSequence) -> None:
        super().__init__(keys, blocks)
        self._blocks = blocks

    def rows(self, indices: npt.NDArray[np.int64], order: npt.NDArray[np.int64] | None) -> Rows:
        """See `Held.rows`."""
        return ordered([self._blocks[int(index)] for index in indices], order, owned=False)


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


def hold(source: Source, *, samples: bool, most_bytes: int) -> Held:
    """Read a source into memory.

    Args:
        source: What to read, once.
        samples: Whether samples are built from it, which needs the values and not just tensors.
        most_bytes: Bytes that may be under way from the server.
    """
    table = None if samples else _table(source, most_bytes)
    if table is not None:
        return table
    blocks = [block.owned() for block in source.ahead(every(source), most_bytes)]
    return Blocks([source.keys(n, block) for n, block in enumerate(blocks)], blocks)


def _table(source: Source, most_bytes: int) -> Table | None:
    """One tensor a field, or None as soon as one block is not like the others."""
    keys: list[U64] = []
    ids: list[Columns] = []
    parts: dict[str, list[Tensor]] = {path: [] for path in source.paths}
    layouts: set[Any] = set()
    blocks = source.ahead(every(source), most_bytes)
    for n, block in enumerate(blocks):
        keys.append(source.keys(n, block))
        ids.append(Columns(paths=(), ids=block.ids, fields={}))
        if not len(block):
            continue
        layouts.add(layout(block))
        if len(layouts) > 1 or None in layouts:
            close_iterator(blocks)
            return None
        for path, tensors in parts.items():
            tensors.append(_tensor(block, path))
    if not layouts:
        return None
    return Table(keys, ids, {path: torch.cat(tensors) for path, tensors in parts.items()})


def every(source: Source) -> Iterator[int]:
    """The indices of all blocks; without an end where their number is not known."""
    return iter(range(source.count)) if source.count is not None else itertools.count()


def layout(block: Columns) -> tuple[Any, ...] | None:
    """What must be the same in all blocks of a table; None where a field is no tensor."""
    arrays = [block[path].array() for path in block.paths]
    forms = [(block[path].kind, block[path].dtype) for path in block.paths]
    if any(array is None for array in arrays):
        return None
    return tuple((*form, a.shape[1:]) for form, a in zip(forms, arrays, strict=True) if a is not None)
