"""Keeps all rows of a query: in memory (`load`), or in memory-mapped files, for later runs too (`download`).

Rows whose fields are all alike are kept as one tensor a field; others as columns in memory, as BSON on disk.

A download is found again by the digest of its content (see `training_set`), the query, the plan's bounds on `_id`
(every `prefetch_size`-th `_id`, the first and the last), the fields and the version of the format.

Guarantees: a download has the name of the content that was read into it, so what was inserted, deleted or changed
since is never served from an older one; a cached select serves the same rows in the same order as reading them
again would; a download is built in a folder of its own, under a lock, and renamed when it is complete: half a
download is never used, and the next one removes what a process left that was killed.
"""

from __future__ import annotations

import abc
import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mongotorch.data.decode import U64, Columns, decode, pack_ids
from mongotorch.data.prefetch import close_iterator
from mongotorch.data.stream.batches import CachedRows, Rows, layout, ordered, tensor_of
from mongotorch.data.stream.shuffle import ROW_WEIGHT, Order, WindowSpec
from mongotorch.data.stream.windows import Window, WindowReader
from mongotorch.data.training_set import ContentDigest

_FORMAT = 3
_BUILDING = ".building-"
_YOUNG_S = 60.0
Skipped = tuple[int, str]  # how many documents of a range were left out, and what is wrong with the first of them


class RangeSequence(Protocol):
    """Ranges by number: a list, or files that decode them."""

    def __getitem__(self, number: int, /) -> Columns:
        """One range."""
        ...


class CachedSelect(abc.ABC):
    """All rows of a query.

    Args:
        keys: The row keys of each range, see `WindowReader.keys`.
        ids: The `_id`s of each range.
        by_id: Whether rows come in the order of their `_id`s where they are not shuffled.
        skipped: How many documents of each range were left out, and what is wrong with the first of them.
        weights: The weights of the rows of each range, see `WindowReader.weights`; empty without a weight.

    Attributes:
        count: How many ranges there are.
        count_rows: How many documents there are.
    """

    def __init__(
        self,
        keys: list[U64],
        ids: RangeSequence,
        *,
        by_id: bool,
        skipped: list[Skipped],
        weights: list[npt.NDArray[Any]],
    ) -> None:
        self._keys, self._ids, self._by_id, self._skipped, self._weights = keys, ids, by_id, skipped, weights
        self.count, self.count_rows = len(keys), sum(map(len, keys))

    def read(self, specs: Iterator[WindowSpec]) -> Iterator[Window]:
        """The windows of these specs, as `WindowReader.read` gives them."""
        for spec in specs:
            keys = [self._keys[number] for number in spec.ranges]
            weights = [self._weights[number] for number in spec.ranges] if self._weights else None
            order, hashes = spec.order.arranged(keys, weights)
            rows = self.rows(spec.ranges, order)
            ids = self._ids[spec.ranges[0]].ids if hashes is None and self._by_id else None
            rows.set_markers(hashes, ids if ids is None or order is None else ids.take(order, identity=True))
            left_out = [self._skipped[number] for number in spec.ranges]
            yield Window(
                spec=spec,
                rows=rows,
                lengths=[len(one) + count for one, (count, _) in zip(keys, left_out, strict=True)],
                skipped=sum(count for count, _ in left_out),
                why=next((why for _, why in left_out if why), ""),
            )

    def count_drawn(self, order: Order) -> int:
        """How many rows an epoch has by the weights."""
        return sum(int(order.times(weights).sum()) for weights in self._weights)

    @abc.abstractmethod
    def rows(self, ranges: list[int], order: npt.NDArray[np.int64] | None) -> Rows:
        """The rows of some ranges, in an order."""

    def close(self) -> None:
        """Let go of files."""
        if isinstance(self._ids, _MappedRanges):
            self._ids.close()


@final
class CachedTensors(CachedSelect):
    """Rows as one tensor a field."""

    def __init__(
        self,
        keys: list[U64],
        ids: RangeSequence,
        tensors: dict[str, Tensor],
        *,
        by_id: bool,
        skipped: list[Skipped],
        weights: list[npt.NDArray[Any]],
    ) -> None:
        super().__init__(keys, ids, by_id=by_id, skipped=skipped, weights=weights)
        self._tensors = tensors
        self._starts = np.cumsum([0, *map(len, keys)]).astype(np.int64)

    def rows(self, ranges: list[int], order: npt.NDArray[np.int64] | None) -> Rows:
        """See `CachedSelect.rows`."""
        flat = np.concatenate([np.arange(self._starts[n], self._starts[n + 1], dtype=np.int64) for n in ranges])
        return CachedRows(self._tensors, flat if order is None else flat[order])


@final
class CachedColumns(CachedSelect):
    """Rows as columns, in memory or decoded from mapped BSON when asked for."""

    def __init__(
        self,
        keys: list[U64],
        ranges: RangeSequence,
        *,
        by_id: bool,
        skipped: list[Skipped],
        weights: list[npt.NDArray[Any]],
    ) -> None:
        super().__init__(keys, ranges, by_id=by_id, skipped=skipped, weights=weights)
        self._ranges = ranges

    def rows(self, ranges: list[int], order: npt.NDArray[np.int64] | None) -> Rows:
        """See `CachedSelect.rows`."""
        return ordered([self._ranges[n] for n in ranges], order, owned=False)


@final
class _NotAlikeError(Exception):
    """The fields of a range are not tensors like those before it."""


def _alike(reader: WindowReader, content: ContentDigest | None = None) -> Iterator[tuple[U64, Columns]]:
    """All ranges with their row keys, added to a digest. Raises: _NotAlikeError."""
    layouts: set[Any] = set()
    if reader.samples:  # they need the values, not just tensors
        raise _NotAlikeError
    replies = reader.replies(reader.all_ranges(), prefetch=True)
    try:
        for number, range_replies in enumerate(replies):
            if content is not None:
                range_replies = reader.kept(range_replies)
                content.add(*range_replies)
            columns = reader.decode(range_replies)
            if len(columns):
                layouts.add(layout(columns))
            if len(layouts) > 1 or None in layouts:
                raise _NotAlikeError
            yield reader.keys(number, columns), columns
    finally:
        close_iterator(replies)
    if not layouts:
        raise _NotAlikeError


def load(reader: WindowReader) -> CachedSelect:
    """Read all rows into memory."""
    by_id = reader.plan is not None
    keys: list[U64] = []
    ids: list[Columns] = []
    parts: dict[str, list[Tensor]] = {path: [] for path in reader.paths}
    skipped: list[Skipped] = []
    weights: list[npt.NDArray[Any]] = []
    try:
        for range_keys, columns in _alike(reader):
            keys.append(range_keys)
            weights += _weights(reader, len(weights), columns)
            skipped.append((columns.skipped, columns.why))
            ids.append(Columns(paths=(), ids=columns.ids, fields={}))
            for path, tensors in parts.items() if len(columns) else ():
                tensors.append(tensor_of(columns, path))
        whole = {path: torch.cat(tensors) for path, tensors in parts.items()}
        return CachedTensors(keys, ids, whole, by_id=by_id, skipped=skipped, weights=weights)
    except _NotAlikeError:
        del ids, parts
    ranges = [columns.owned() for columns in reader.ranges(reader.all_ranges())]
    keys = [reader.keys(n, columns) for n, columns in enumerate(ranges)]
    skipped = [(columns.skipped, columns.why) for columns in ranges]
    weights = [found for n, columns in enumerate(ranges) for found in _weights(reader, n, columns)]
    return CachedColumns(keys, ranges, by_id=by_id, skipped=skipped, weights=weights)


def _weights(reader: WindowReader, number: int, columns: Columns) -> list[npt.NDArray[Any]]:
    """The weights of the rows of a range, if there are weights."""
    found = reader.weights(number, columns)
    return [] if found is None else [found]


def download(reader: WindowReader, folder: Path, content: Callable[[], str], *parts: Any) -> CachedSelect:
    """Read all rows into memory-mapped files, or find them from an earlier run.

    Args:
        reader: What to read, once.
        folder: The cache's folder; made if it is missing.
        content: Gives the digest of the documents, as `Members.digest` has it; asked only where there are
            downloads to choose from. The name of a new one is that of the documents that were read into it.
        parts: What else it depends on.
    """
    prefix = _hash(*parts)[:32]
    if any(folder.glob(f"{prefix}-*")):
        target = folder / f"{prefix}-{_hash(content())[:32]}"
        if (target / "meta.json").exists():
            return _open(reader, target)
    with working_folder(folder) as building:
        meta, found = _write(reader, building)
        (building / "meta.json").write_text(json.dumps(meta))
        target = folder / f"{prefix}-{_hash(found)[:32]}"
        _rename(building, target)
    return _open(reader, target)


def _hash(*parts: Any) -> str:
    text = json.dumps([_FORMAT, str(torch.get_default_dtype()), *map(str, parts)])
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def working_folder(folder: Path) -> Iterator[Path]:
    """A folder in the cache, locked as long as this process needs it; removed then, unless it was renamed.

    What processes left that were killed is removed first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    building = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=folder))
    lock = os.open(building, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: nobody removes it then
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield building
    finally:
        shutil.rmtree(building, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(folder: Path) -> None:
    """Remove what processes left that were killed while they built a download."""
    for left in folder.glob(f"{_BUILDING}*"):
        with contextlib.suppress(OSError):  # it is gone by now, or another process builds it
            if time.time() - left.stat().st_mtime < _YOUNG_S:
                continue  # it may not be locked yet
            lock = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


@final
class _MappedRanges:
    """BSON in one mapped file, decoded range by range."""

    def __init__(self, decode: Callable[[list[Any]], Columns], path: Path, ends: list[int]) -> None:
        self._decode = decode
        self._ends = [0, *ends]
        with path.open("rb") as file:  # an empty file cannot be mapped
            self._map: mmap.mmap | bytes = (
                b"" if not ends or not ends[-1] else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            )

    def __getitem__(self, number: int) -> Columns:
        return self._decode([self._map[self._ends[number] : self._ends[number + 1]]])

    def close(self) -> None:
        if isinstance(self._map, mmap.mmap):
            self._map.close()


def _write(reader: WindowReader, folder: Path) -> tuple[dict[str, Any], str]:
    """Write plain numbers, or, as soon as one range is not like the others, all of it again as BSON.

    Returns:
        What a reader of the files has to know; and the digest of the documents.
    """
    try:
        return _write_tensors(reader, folder)
    except _NotAlikeError:
        for path in folder.iterdir():
            path.unlink()
        return _write_bson(reader, folder)


def _write_tensors(reader: WindowReader, folder: Path) -> tuple[dict[str, Any], str]:
    content = ContentDigest()
    lengths: list[int] = []
    ends: list[int] = []
    fields: list[dict[str, Any]] = []
    skipped: list[Skipped] = []
    with (
        (folder / "ids.bson").open("wb") as id_file,
        (folder / "keys").open("wb") as key_file,
        (folder / "weights").open("wb") as weight_file,
    ):
        for keys, columns in _alike(reader, content):
            keys.tofile(key_file)
            for weights in _weights(reader, len(lengths), columns):
                weights.tofile(weight_file)
            lengths.append(len(columns))
            skipped.append((columns.skipped, columns.why))
            if reader.plan is not None:
                id_file.write(pack_ids(columns.ids))
            ends.append(id_file.tell())
            fields = _append(folder, reader.paths, columns) if len(columns) else fields
    return {"lengths": lengths, "ends": ends, "fields": fields, "skipped": skipped}, content.hex


def _write_bson(reader: WindowReader, folder: Path) -> tuple[dict[str, Any], str]:
    content = ContentDigest()
    lengths: list[int] = []
    ends: list[int] = []
    skipped: list[Skipped] = []
    with (
        (folder / "rows.bson").open("wb") as bson_file,
        (folder / "keys").open("wb") as key_file,
        (folder / "weights").open("wb") as weight_file,
    ):
        for number, replies in enumerate(map(reader.kept, reader.replies(reader.all_ranges()))):
            content.add(*replies)
            columns = reader.decode(replies)
            reader.keys(number, columns).tofile(key_file)
            for weights in _weights(reader, number, columns):
                weights.tofile(weight_file)
            lengths.append(len(columns))
            skipped.append((columns.skipped, columns.why))
            bson_file.writelines(map(bytes, replies))
            ends.append(bson_file.tell())
    return {"lengths": lengths, "ends": ends, "fields": None, "skipped": skipped}, content.hex


def _append(folder: Path, paths: tuple[str, ...], columns: Columns) -> list[dict[str, Any]]:
    fields = []
    for n, path in enumerate(paths):
        tensor = tensor_of(columns, path)
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


def _open(reader: WindowReader, folder: Path) -> CachedSelect:
    by_id = reader.plan is not None
    meta = json.loads((folder / "meta.json").read_text())
    lengths = meta["lengths"]
    skipped = meta.get("skipped") or [(0, "")] * len(lengths)  # that of an earlier release has none
    flat = np.fromfile(folder / "keys", dtype=np.uint64)
    keys = np.split(flat, np.cumsum(lengths)[:-1]) if lengths else []
    weights: list[npt.NDArray[Any]] = []
    if reader.weight is not None and lengths:
        weights = np.split(np.fromfile(folder / "weights", dtype=ROW_WEIGHT), np.cumsum(lengths)[:-1])
    if meta["fields"] is None:
        mapped = _MappedRanges(reader.decode, folder / "rows.bson", meta["ends"])
        return CachedColumns(keys, mapped, by_id=by_id, skipped=skipped, weights=weights)
    tensors = {}
    for n, (path, field) in enumerate(zip(reader.paths, meta["fields"], strict=True)):
        shape = [sum(lengths), *field["shape"]]
        tensors[path] = torch.from_file(
            str(folder / f"field-{n}"),
            shared=False,
            size=int(np.prod(shape)),
            dtype=getattr(torch, field["dtype"]),
        ).reshape(shape)
    ids = _MappedRanges(lambda replies: decode(replies, ()), folder / "ids.bson", meta["ends"])
    return CachedTensors(keys, ids, tensors, by_id=by_id, skipped=skipped, weights=weights)
