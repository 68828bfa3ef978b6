"""All rows at once: in memory, or in memory-mapped files on local disk.

Always: what is held serves the same rows in the same order as reading them again would; a download is built
in a folder of its own and renamed when it is complete, so a half download is never used. Rows whose fields
are all alike become one table of tensors; others are kept as blocks (in memory) or as BSON (on disk).

A download is found again by the query, the plan's bounds on `_id` (every `prefetch_size`-th `_id`, the first
and the last), the number of documents, the fields and the versions of the format. Documents inserted or
deleted are noticed by that. **Documents changed in place under the same `_id` are not**: delete the cache
folder then.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mongotorch.data.columns import Columns
from mongotorch.data.order import U64
from mongotorch.data.rows import ColumnRows, Rows, TableRows
from mongotorch.data.source import Source
from mongotorch.data.tensors import column_tensor

_FORMAT = 1


class Held:
    """All rows of a source."""

    window: int
    count: int

    def __init__(self, keys: list[U64]) -> None:
        self._keys = keys
        self.count = len(keys)
        self._starts = np.cumsum([0, *map(len, keys)]).astype(np.int64)

    def keys(self, indices: Iterable[int]) -> U64:
        """The row keys of some blocks, one after the other."""
        return np.concatenate([self._keys[index] for index in indices])

    def rows(self, indices: npt.NDArray[np.int64], order: npt.NDArray[Any] | None) -> Rows:
        """The rows of some blocks, in an order."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of files."""


@final
class Table(Held):
    """Rows as tensors."""

    def __init__(self, keys: list[U64], tensors: dict[str, Tensor]) -> None:
        super().__init__(keys)
        self._tensors = tensors

    def rows(self, indices: npt.NDArray[np.int64], order: npt.NDArray[Any] | None) -> Rows:
        """See `Held.rows`."""
        spans = [np.arange(self._starts[i], self._starts[i + 1], dtype=np.int64) for i in indices]
        flat = np.concatenate(spans)
        return TableRows(self._tensors, flat if order is None else flat[order])


@final
class Blocks(Held):
    """Rows as blocks of columns, in memory or decoded from mapped BSON when asked for."""

    def __init__(self, keys: list[U64], blocks: _MappedBlocks | list[Columns]) -> None:
        super().__init__(keys)
        self._blocks = blocks

    def rows(self, indices: npt.NDArray[np.int64], order: npt.NDArray[Any] | None) -> Rows:
        """See `Held.rows`."""
        return ordered([self._blocks[int(index)] for index in indices], order, owned=False)

    def close(self) -> None:
        """See `Held.close`."""
        if isinstance(self._blocks, _MappedBlocks):
            self._blocks.close()


def ordered(blocks: list[Columns], order: npt.NDArray[Any] | None, *, owned: bool) -> Rows:
    """The rows of blocks, in an order; `owned` where the blocks serve nobody else."""
    columns = blocks[0] if len(blocks) == 1 else Columns.concat(blocks)
    if order is None:
        return ColumnRows(columns, owned=owned)
    return ColumnRows(columns.take(order), owned=True)


def hold(source: Source, *, samples: bool) -> Held:
    """Read a source into memory.

    Args:
        source: What to read, once.
        samples: Whether samples are built from it, which needs the values and not just tensors.
    """
    indices = range(source.count) if source.count is not None else _endless()
    blocks = list(source.blocks(indices))
    keys = [source.keys(n, block) for n, block in enumerate(blocks)]
    layouts = {_layout(block) for block in blocks if len(block)}
    if samples or len(layouts) != 1 or None in layouts:
        return Blocks(keys, blocks)
    tensors: dict[str, Tensor] = {}
    for path in source.paths:
        parts = [column_tensor(block, path) for block in blocks if len(block)]
        tensors[path] = torch.cat([part for part in parts if part is not None])
    return Table(keys, tensors)


def download(source: Source, folder: Path, name: str, *, samples: bool) -> Held:
    """Read a source into memory-mapped files, or find them from an earlier run.

    Args:
        source: What to read, once.
        folder: The cache's folder; made if it is missing.
        name: What the content depends on; see `cache_name`.
        samples: Whether samples are built from it, which needs the values and not just tensors.
    """
    target = folder / name
    if not (target / "meta.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{name[:16]}-", dir=folder))
        try:
            _build(source, building, samples=samples)
            _rename(building, target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return _open(source, target)


def cache_name(*parts: Any) -> str:
    """The name of a download that depends on these values."""
    text = json.dumps([_FORMAT, str(torch.get_default_dtype()), *map(str, parts)])
    return hashlib.sha256(text.encode()).hexdigest()


@final
class _MappedBlocks:
    """BSON in one mapped file, decoded block by block."""

    def __init__(self, source: Source, path: Path, ends: list[int]) -> None:
        self._source = source
        self._ends = [0, *ends]
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __getitem__(self, index: int) -> Columns:
        return self._source.decode([self._map[self._ends[index] : self._ends[index + 1]]])

    def close(self) -> None:
        self._map.close()


def _endless() -> Iterator[int]:
    n = 0
    while True:
        yield n
        n += 1


def _layout(block: Columns) -> tuple[Any, ...] | None:
    """What must be the same in all blocks of a table; None where a field is no tensor."""
    arrays = [block[path].array() for path in block.paths]
    forms = [(block[path].kind, block[path].dtype) for path in block.paths]
    if any(array is None for array in arrays):
        return None
    return tuple((*form, a.shape[1:]) for form, a in zip(forms, arrays, strict=True) if a is not None)


def _build(source: Source, folder: Path, *, samples: bool) -> None:
    """Write BSON, and beside it tensors as long as all blocks have one layout."""
    lengths: list[int] = []
    ends: list[int] = []
    layouts: set[Any] = {None} if samples else set()
    fields: list[dict[str, Any]] = []
    indices = range(source.count) if source.count is not None else _endless()
    with (folder / "rows.bson").open("wb") as bson_file, (folder / "keys").open("wb") as key_file:
        for n, raws in enumerate(source.raws(indices)):
            block = source.decode(raws)
            source.keys(n, block).tofile(key_file)
            lengths.append(len(block))
            bson_file.writelines(raws)
            ends.append(bson_file.tell())
            if len(block):
                layouts.add(_layout(block))
            if len(block) and len(layouts) == 1 and None not in layouts:
                fields = _append(folder, source.paths, block)
    table = len(layouts) == 1 and None not in layouts
    if table:
        (folder / "rows.bson").unlink()
    meta = {"lengths": lengths, "ends": ends, "fields": fields if table else None}
    (folder / "meta.json").write_text(json.dumps(meta))


def _append(folder: Path, paths: tuple[str, ...], block: Columns) -> list[dict[str, Any]]:
    fields = []
    for n, path in enumerate(paths):
        tensor = column_tensor(block, path)
        assert tensor is not None  # noqa: S101 - for the type checker; `_layout` saw it
        with (folder / f"field-{n}").open("ab") as file:
            tensor.contiguous().flatten().view(torch.uint8).numpy().tofile(file)
        fields.append({"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape[1:])})
    return fields


def _rename(building: Path, target: Path) -> None:
    try:
        building.rename(target)
    except OSError:  # another process was first; what it built is the same
        if not (target / "meta.json").exists():
            raise


def _open(source: Source, folder: Path) -> Held:
    meta = json.loads((folder / "meta.json").read_text())
    lengths = meta["lengths"]
    flat = np.fromfile(folder / "keys", dtype=np.uint64)
    keys = np.split(flat, np.cumsum(lengths)[:-1]) if lengths else []
    if meta["fields"] is None:
        return Blocks(keys, _MappedBlocks(source, folder / "rows.bson", meta["ends"]))
    tensors = {}
    for n, (path, field) in enumerate(zip(source.paths, meta["fields"], strict=True)):
        shape = [sum(lengths), *field["shape"]]
        tensors[path] = torch.from_file(
            str(folder / f"field-{n}"),
            shared=False,
            size=int(np.prod(shape)),
            dtype=getattr(torch, field["dtype"]),
        ).reshape(shape)
    return Table(keys, tensors)
