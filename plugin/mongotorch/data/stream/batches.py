"""The rows of a window, in the order of the epoch, and the batches that are cut from them.

A field of a window is one tensor where its values are all alike, and batches are slices of it; only where they are
not is it stacked value by value. Large tensors are memory mappings of their own (`fresh`): `malloc` would keep
memory of that size in its heaps after the first window, where smaller allocations break it up, so that the process
grows every few windows, and would hand it out in pages of 4 KB, each of which is a page fault while rows are
scattered over them. A `transform` or a `collate_fn` gets samples (`SampleBuilder`) in the structure of the key:
arrays are tensors in them, plain numbers Python numbers, plain lists Python lists.

Guarantees: rows are ordered once a window; the batches of a shard are a function of the rows and of the position
where it starts; all shards take the same number of steps; samples are only built for a `transform` or a
`collate_fn`.
"""

from __future__ import annotations

import abc
import contextlib
import itertools
import math
import mmap
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mongotorch.codecs.arrays import BFLOAT16
from mongotorch.data.decode import Column, Columns, decode
from mongotorch.data.prefetch import ReadPressure, check_picklable
from mongotorch.data.stream.position import HashMarkers, IdMarkers, Position, RowMarkers
from mongotorch.errors import MongotorchError, TransformError
from mongotorch.signature import Key, sample_caller
from mongotorch.tensors import collate, concat, from_array, one_tensor, stack


class Rows(abc.ABC):
    """The rows of one window, in order.

    Attributes:
        markers: What finds the row again that was yielded last; None counts rows instead.
        skipped: Documents that were left out in earlier windows of the epoch.
    """

    markers: RowMarkers | None = None
    skipped: int = 0

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

    def set_markers(self, hashes: npt.NDArray[np.uint64] | None, ids: Column | None) -> None:
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
        tensors: Of paths, each of shape (rows, ...); or of several paths together, (paths, rows).
        ids: The `_id`s, in the order of reading.
        order: Where in `ids` each row is; None is that very order.
    """

    def __init__(
        self, tensors: dict[tuple[str, ...], Tensor], ids: Column, order: npt.NDArray[np.int64] | None
    ) -> None:
        self._tensors = tensors
        self._ids, self._order = ids, order

    def __len__(self) -> int:
        return len(self._ids)

    def tensor(self, path: str, start: int, stop: int) -> Tensor | None:
        """See `Rows.tensor`."""
        return self.batch(start, stop)[path]

    def batch(self, start: int, stop: int) -> dict[str, Tensor]:
        """All fields of some rows."""
        found: dict[str, Tensor] = {}
        for paths, tensor in self._tensors.items():
            if len(paths) == 1:
                found[paths[0]] = tensor[start:stop]
            else:
                found.update(zip(paths, tensor[:, start:stop].unbind(), strict=True))
        return found

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


NO_ROWS = TensorRows({}, decode(b"", ()).ids, None)


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
    """The rows of ranges, in an order; `owned` where their columns are used nowhere else."""
    columns = parts[0] if len(parts) == 1 else Columns.concat(parts)
    if order is None:
        return ColumnRows(columns.owned(), owned=owned)
    return ColumnRows(columns.take(order), owned=True)


def gathered(parts: list[Columns], order: npt.NDArray[np.int64] | None) -> Rows:
    """The rows of ranges that are used nowhere else, in an order: as tensors where all fields are alike."""
    layouts = {layout(columns) for columns in parts}
    if len(layouts) > 1 or None in layouts:
        return ordered(parts, order, owned=True)
    ids = Columns.concat([Columns(paths=(), ids=columns.ids, fields={}) for columns in parts]).ids
    if len(parts) == 1 and order is None:
        return TensorRows({(path,): tensor_of(parts[0], path) for path in parts[0].paths}, ids, None)
    groups: dict[torch.dtype, list[str]] = {}
    others: list[str] = []
    first = parts[0].slice(0, 1)
    for path in first.paths:
        values = first[path].numbers()
        if values is not None and values.ndim == 1 and first.plain(path):
            groups.setdefault(tensor_of(first, path).dtype, []).append(path)
        else:
            others.append(path)
    tensors = {tuple(paths): _numbers(parts, paths, dtype, order) for dtype, paths in groups.items()}
    if others:
        # Each row goes to where it belongs at once: joining ranges first would copy, and hold, all of them twice.
        targets = torch.empty(len(ids), dtype=torch.int64)
        rows = torch.arange(len(ids)) if order is None else torch.from_numpy(order)
        targets[rows] = torch.arange(len(ids))
        tensors |= {(path,): _scattered(parts, path, targets) for path in others}
    return TensorRows(tensors, ids, order)


def _numbers(
    parts: list[Columns], paths: list[str], dtype: torch.dtype, order: npt.NDArray[np.int64] | None
) -> Tensor:
    """Fields that are one number a document, of all ranges, in an order; (rows,), or (paths, rows) of several."""
    count = sum(map(len, parts))
    whole = fresh((len(paths), count), dtype)
    joined = np.empty(count, whole.numpy().dtype)
    for path, row in zip(paths, whole.numpy(), strict=True):
        # One field after the other, so that little is held twice; converted as torch converts it.
        into = row if order is None else joined
        np.concatenate([np.asarray(part[path].data) for part in parts], out=into, casting="unsafe")
        if order is not None:
            joined.take(order, out=row, mode="clip")
    return whole[0] if len(paths) == 1 else whole


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
    octets = values.reshape(len(values), math.prod(values.shape[1:])).view(np.uint8)
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


RowSlice = tuple[Rows, int, int]  # rows of a window, from the first to before the second number


def rows_in(slices: list[RowSlice]) -> int:
    """How many rows a batch has."""
    return sum(stop - start for _, start, stop in slices)


def columns_of(slices: list[RowSlice]) -> Columns:
    """The columns of a batch's rows."""
    parts = [rows.columns(start, stop) for rows, start, stop in slices]
    return parts[0] if len(parts) == 1 else Columns.concat(parts)


def batch_of(slices: list[RowSlice], key: Key) -> Any:
    """The batch in the structure of the key, each field a tensor of shape (n, ...).

    Raises:
        ShapeError: Shapes differ; `field` and `document_id` name where.
        DataError: A value has no tensor.
    """
    rows, start, stop = slices[0]
    if len(slices) == 1 and isinstance(rows, TensorRows):
        return key.arrange(rows.batch(start, stop).__getitem__)
    return key.arrange(_once(lambda path: _field(slices, path)))


def _once(value: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    known: dict[str, Tensor] = {}
    return lambda path: known[path] if path in known else known.setdefault(path, value(path))


def _field(slices: list[RowSlice], path: str) -> Tensor:
    tensors = [rows.tensor(path, start, stop) for rows, start, stop in slices]
    found = [tensor for tensor in tensors if tensor is not None]
    if len(found) == len(tensors):
        return concat(found, field=path)
    values: list[Any] = []
    ids: list[Any] = []
    for tensor, (rows, start, stop) in zip(tensors, slices, strict=True):
        values.extend(rows.columns(start, stop)[path].values() if tensor is None else tensor.unbind())
        ids.extend(rows.ids(start, stop))
    return stack(values, field=path, ids=ids)


def cut(
    windows: Iterator[tuple[int, Rows]],
    start: Position,
    *,
    batch_size: int,
    drop_last: bool,
    shard: tuple[int, int],
) -> Iterator[tuple[list[RowSlice], Position]]:
    """The rows of one batch after the other, for one shard, each with the position behind it.

    `world` batches make a round, one for each rank; a round that the rows do not fill is dealt out evenly, so
    that all ranks take the same number of steps. Up to `world - 1` rows of an epoch are left over that way.
    Behind such a round is the next epoch.

    Args:
        windows: The rows from `start.window` on.
        start: Where to start.
        batch_size: Rows of a batch.
        drop_last: Leave out a last round that is not full.
        shard: (rank, world).
    """
    rank, world = shard
    size = batch_size * world
    open_round: list[RowSlice] = []
    have, step = 0, start.step
    for window, rows in windows:
        at = start.row(rows.markers) if window == start.window else 0
        while have + len(rows) - at >= size:
            end = at + size - have
            step += 1
            yield (
                _share([*open_round, (rows, at, end)], rank * batch_size, (rank + 1) * batch_size),
                Position(
                    epoch=start.epoch,
                    window=window,
                    offset=end,
                    step=step,
                    skipped=rows.skipped,
                    markers=rows.markers,
                ),
            )
            open_round, have, at = [], 0, end
        if at < len(rows):
            open_round.append((rows, at, len(rows)))
            have += len(rows) - at
    each = have // world
    if each and not drop_last:
        yield _share(open_round, rank * each, (rank + 1) * each), Position(epoch=start.epoch + 1)


def count_batches(rows: int, *, batch_size: int, drop_last: bool, shard: tuple[int, int]) -> int:
    """How many batches `cut` makes of so many rows, for each shard."""
    rounds, left = divmod(rows, batch_size * shard[1])
    return rounds + (left >= shard[1] and not drop_last)


class LaneBatches(NamedTuple):
    """What one shard has of a step that is cut into lanes.

    Attributes:
        batches: The batches of its lanes; None for a lane without a row.
        rows: Samples in each of them.
        planned: Documents of the whole step, in all shards.
        skipped: Documents of this shard that were left out.
        position: A small number that is the same in all shards that have read the same documents.
    """

    batches: tuple[Any, ...]
    rows: tuple[int, ...]
    planned: int
    skipped: int
    position: int


def lane_of(slices: list[RowSlice], rows: int, lane: int, lanes: int) -> list[RowSlice]:
    """The rows of one lane: the first `rows` are cut evenly, the first lanes have one more where it is needed."""
    return _share(slices, lane_start(rows, lane, lanes), lane_start(rows, lane + 1, lanes))


def lane_start(rows: int, lane: int, lanes: int) -> int:
    """How many of so many rows lie before those of a lane."""
    each, more = divmod(rows, lanes)
    return lane * each + min(lane, more)


def _share(slices: list[RowSlice], start: int, stop: int) -> list[RowSlice]:
    """Rows `start` to `stop` of the slices taken together."""
    chosen: list[RowSlice] = []
    before = 0
    for rows, first, last in slices:
        low, high = max(start - before, 0), min(stop - before, last - first)
        if low < high:
            chosen.append((rows, first + low, first + high))
        before += last - first
    return chosen


class Built(NamedTuple):
    """A batch that was made of samples.

    Attributes:
        batch: What `collate_fn` gave; None where no sample was left.
        rows: Samples in it.
        skipped: Documents that were left out of it.
        why: What is wrong with the first of them.
    """

    batch: Any
    rows: int
    skipped: int = 0
    why: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class SampleBuilder:
    """Builds a batch out of columns by way of samples; runs in a worker as well as here.

    Attributes:
        key: The structure of a sample.
        transform: Returns the sample in its place; None keeps it as it is.
        signature: How the sample goes into `transform`.
        collate_fn: Makes a batch of a list of samples; None stacks them.
        skips: Whether documents are left out for which `transform` fails.
    """

    key: Key
    transform: Callable[..., Any] | None = None
    signature: str = "*args"
    collate_fn: Callable[[list[Any]], Any] | None = None
    skips: bool = False

    def __call__(self, columns: Columns, seed: int | None = None) -> Built:
        """The batch of the rows.

        Args:
            columns: The rows.
            seed: Where the generators of torch, numpy and Python start for it; None leaves them as they are.

        Raises:
            DataError: Samples that cannot be stacked.
            TransformError: `transform` or `collate_fn` raised, or gave None; `document_id` names the document.
            SignatureError: `transform` does not take what the signature gives it.
        """
        if seed is not None:
            with _drawing_from(seed):
                return self(columns)
        samples, ids, why = build(columns, self.key), columns.ids, ""
        count = len(samples)
        if self.transform is not None:
            samples, rows, why = self._all_transformed(self.transform, samples, columns)
            ids = ids.take(np.array(rows, np.intp), identity=True) if len(rows) < count else ids
        batch = self._together(samples, ids) if samples else None
        return Built(batch=batch, rows=len(samples), skipped=count - len(samples), why=why)

    def _together(self, samples: list[Any], ids: Column) -> Any:
        if self.collate_fn is None:
            return collate(samples, ids)
        try:
            return self.collate_fn(samples)
        except MongotorchError:
            raise
        except Exception as error:
            raise TransformError(
                f"collate_fn failed for the batch of {len(ids)} document(s) from {ids[0]!r} to {ids[-1]!r}: "
                f"{type(error).__name__}: {error}",
                document_id=ids[0],
                field="collate_fn",
            ) from error

    def _all_transformed(
        self, transform: Callable[..., Any], samples: list[Any], columns: Columns
    ) -> tuple[list[Any], list[int], str]:
        """What `transform` makes of them, of which rows, and what it said of the first that is left out."""
        call = sample_caller(transform, self.key, self.signature)
        made: list[Any] = []
        rows: list[int] = []
        why = ""
        for row, sample in enumerate(samples):
            one, failed = None, None
            try:
                one = call(sample)
            except Exception as error:  # noqa: BLE001 - it is raised below, or told of
                failed = _failed(error, columns.ids, row)
            if one is None and (failed is not None or self.collate_fn is None):
                # A collate_fn may leave samples out that are None.
                failed = failed or _transform_error(
                    "returned None for", columns.ids, row, "; let it return the sample"
                )
                if not self.skips or not isinstance(failed, TransformError):
                    raise failed
                why = why or str(failed)
                continue
            made.append(one)
            rows.append(row)
        return made, rows, why

    def build_each(
        self, many: Iterator[tuple[Columns | None, int | None]], *, pressure: ReadPressure | None = None
    ) -> Iterator[Built]:
        """The batches of these columns and seeds, one each, as an ordered map (see `prefetch`)."""
        for columns, seed in itertools.takewhile(lambda _: pressure is None or not pressure.stopped(), many):
            built = Built(batch=None, rows=0) if columns is None else self(columns, seed)
            if pressure is not None:  # it goes to another process
                check_picklable(built.batch)
            yield built


@contextlib.contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """Let what is inside draw numbers that depend on a seed alone."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def build(columns: Columns, key: Key) -> list[Any]:
    """The samples of the rows, in the structure of the key."""
    return key.samples({path: _values(columns, path) for path in key.paths})


def _values(columns: Columns, path: str) -> Sequence[Any]:
    column = columns[path]
    if column.kind == "object":
        return [one_tensor(value) if isinstance(value, np.ndarray) else value for value in column.values()]
    if column.kind != "array":
        return column.values()
    whole = column_tensor(columns, path)
    return [] if whole is None else whole.unbind()


def _failed(error: Exception, ids: Column, row: int) -> MongotorchError:
    if isinstance(error, MongotorchError):
        return error
    failed = _transform_error("failed for", ids, row, f": {type(error).__name__}: {error}")
    failed.__cause__ = error
    return failed


def _transform_error(what: str, ids: Column, row: int, more: str) -> TransformError:
    document_id = ids[row]
    return TransformError(
        f"transform {what} document {document_id!r}{more}", document_id=document_id, field="transform"
    )
