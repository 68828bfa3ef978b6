"""All rows at once, in memory; `download` has them in memory-mapped files.

Always: what is held serves the same rows in the same order as reading them again would. Rows whose fields are
all alike become one table of tensors; others are kept as blocks.

All rows at once, in memory-mapped files on local disk, for this run and later ones.

Always: a download is built in a folder of its own and renamed when it is complete, so a half download is never
used. Rows whose fields are all alike are files of plain numbers; others are kept as BSON.

A download is found again by the query, the plan's bounds on `_id` (every `prefetch_size`-th `_id`, the first
and the last), the number of documents, the fields and the versions of the format. Documents inserted or
deleted are noticed by that. **Documents changed in place under the same `_id` are not**: delete the cache
folder then.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mongotorch.data.decode.column import Column
from mongotorch.data.decode.decoder import Columns, decode
from mongotorch.data.decode.ids import U64, pack_ids
from mongotorch.data.decode.replies import Reply
from mongotorch.data.prefetch import close_iterator
from mongotorch.data.read.source import Source
from mongotorch.data.stream.rows import CachedRows, Rows, _tensor, column_tensor, layout, ordered


class BlockSequence(Protocol):
    """Blocks by number: a list, or files that decode them."""

    def __getitem__(self, index: int, /) -> Columns:
        """One block."""
        ...


class CachedSelect:
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
class CachedTensors(CachedSelect):
    """Rows as tensors."""

    def __init__(self, keys: list[U64], ids: BlockSequence, tensors: dict[str, Tensor]) -> None:
        super().__init__(keys, ids)
        self._tensors = tensors

    def rows(self, indices: npt.NDArray[np.int64], order: npt.NDArray[np.int64] | None) -> Rows:
        """See `CachedSelect.rows`."""
        spans = [np.arange(self._starts[i], self._starts[i + 1], dtype=np.int64) for i in indices]
        flat = np.concatenate(spans)
        return CachedRows(self._tensors, flat if order is None else flat[order])


@final
class CachedBlocks(CachedSelect):
    """Rows as blocks of columns, in memory or decoded from mapped BSON when asked for."""

    def __init__(self, keys: list[U64], blocks: BlockSequence) -> None:
        super().__init__(keys, blocks)
        self._blocks = blocks

    def rows(self, indices: npt.NDArray[np.int64], order: npt.NDArray[np.int64] | None) -> Rows:
        """See `CachedSelect.rows`."""
        return ordered([self._blocks[int(index)] for index in indices], order, owned=False)


def hold(source: Source, *, samples: bool, most_bytes: int) -> CachedSelect:
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
    return CachedBlocks([source.keys(n, block) for n, block in enumerate(blocks)], blocks)


def _table(source: Source, most_bytes: int) -> CachedTensors | None:
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
    return CachedTensors(keys, ids, {path: torch.cat(tensors) for path, tensors in parts.items()})


def every(source: Source) -> Iterator[int]:
    """The indices of all blocks; without an end where their number is not known."""
    return iter(range(source.count)) if source.count is not None else itertools.count()


_FORMAT = 2


def download(source: Source, folder: Path, name: str, *, samples: bool, most_bytes: int) -> CachedSelect:
    """Read a source into memory-mapped files, or find them from an earlier run.

    Args:
        source: What to read, once.
        folder: The cache's folder; made if it is missing.
        name: What the content depends on; see `cache_name`.
        samples: Whether samples are built from it, which needs the values and not just tensors.
        most_bytes: Bytes that may be under way from the server.
    """
    target = folder / name
    if not (target / "meta.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{name[:16]}-", dir=folder))
        try:
            _build(source, building, samples=samples, most_bytes=most_bytes)
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

    def __init__(self, decode: Callable[[list[Reply]], Columns], path: Path, ends: list[int]) -> None:
        self._decode = decode
        self._ends = [0, *ends]
        with path.open("rb") as file:  # an empty file cannot be mapped
            self._map: mmap.mmap | bytes = (
                b"" if not ends or not ends[-1] else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            )

    def __getitem__(self, index: int) -> Columns:
        return self._decode([self._map[self._ends[index] : self._ends[index + 1]]])

    def close(self) -> None:
        if isinstance(self._map, mmap.mmap):
            self._map.close()


def _build(source: Source, folder: Path, *, samples: bool, most_bytes: int) -> None:
    """Write plain numbers, or, as soon as one block is not like the others, all of it again as BSON."""
    meta = None if samples else _build_table(source, folder, most_bytes)
    if meta is None:
        for path in folder.iterdir():
            path.unlink()
        meta = _build_bson(source, folder)
    (folder / "meta.json").write_text(json.dumps(meta))


def _build_table(source: Source, folder: Path, most_bytes: int) -> dict[str, Any] | None:
    lengths: list[int] = []
    ends: list[int] = []
    layouts: set[Any] = set()
    fields: list[dict[str, Any]] = []
    blocks = source.ahead(every(source), most_bytes)
    with (folder / "ids.bson").open("wb") as id_file, (folder / "keys").open("wb") as key_file:
        for n, block in enumerate(blocks):
            source.keys(n, block).tofile(key_file)
            lengths.append(len(block))
            if source.by_id:
                id_file.write(pack_ids(block.ids))
            ends.append(id_file.tell())
            if not len(block):
                continue
            layouts.add(layout(block))
            if len(layouts) > 1 or None in layouts:
                close_iterator(blocks)
                return None
            fields = _append(folder, source.paths, block)
    return {"lengths": lengths, "ends": ends, "fields": fields}


def _build_bson(source: Source, folder: Path) -> dict[str, Any]:
    lengths: list[int] = []
    ends: list[int] = []
    with (folder / "rows.bson").open("wb") as bson_file, (folder / "keys").open("wb") as key_file:
        for n, raws in enumerate(source.raws(every(source))):
            block = source.decode(raws)
            source.keys(n, block).tofile(key_file)
            lengths.append(len(block))
            bson_file.writelines(raws)
            ends.append(bson_file.tell())
    return {"lengths": lengths, "ends": ends, "fields": None}


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


def _open(source: Source, folder: Path) -> CachedSelect:
    meta = json.loads((folder / "meta.json").read_text())
    lengths = meta["lengths"]
    flat = np.fromfile(folder / "keys", dtype=np.uint64)
    keys = np.split(flat, np.cumsum(lengths)[:-1]) if lengths else []
    if meta["fields"] is None:
        return CachedBlocks(keys, _MappedBlocks(source.decode, folder / "rows.bson", meta["ends"]))
    tensors = {}
    for n, (path, field) in enumerate(zip(source.paths, meta["fields"], strict=True)):
        shape = [sum(lengths), *field["shape"]]
        tensors[path] = torch.from_file(
            str(folder / f"field-{n}"),
            shared=False,
            size=int(np.prod(shape)),
            dtype=getattr(torch, field["dtype"]),
        ).reshape(shape)
    ids = _MappedBlocks(lambda raws: decode(raws, ()), folder / "ids.bson", meta["ends"])
    return CachedTensors(keys, ids, tensors)
