"""Cuts the rows of windows into batches, and builds single samples for a `transform` or a `collate_fn`.

A sample has the structure of the key; arrays are tensors in it, plain numbers Python numbers, plain lists Python
lists. What a transform returns is the sample.

Guarantees: the batches of a shard are a function of the rows and of the position where it starts; all shards take
the same number of steps; without `transform` and `collate_fn` no samples are built.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from torch import Tensor

from mongotorch.data.decode.decoder import Columns
from mongotorch.data.stream.position import Position
from mongotorch.data.stream.rows import Rows, column_tensor
from mongotorch.signature import Key, check_signature
from mongotorch.tensors import collate, concat, one_tensor, stack

RowSlice = tuple[Rows, int, int]  # rows of a window, from the first to before the second number


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
                Position(epoch=start.epoch, window=window, offset=end, step=step, markers=rows.markers),
            )
            open_round, have, at = [], 0, end
        if at < len(rows):
            open_round.append((rows, at, len(rows)))
            have += len(rows) - at
    each = have // world
    if each and not drop_last:
        yield _share(open_round, rank * each, (rank + 1) * each), Position(epoch=start.epoch + 1)


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


@final
@dataclass(frozen=True, kw_only=True)
class SampleBuilder:
    """Builds a batch out of columns by way of samples; runs in a worker as well as here.

    Attributes:
        key: The structure of a sample.
        transform: Returns the sample in its place; None keeps it as it is.
        signature: How the sample goes into `transform`.
        collate_fn: Makes a batch of a list of samples; None stacks them.
    """

    key: Key
    transform: Callable[..., Any] | None = None
    signature: str = "*args"
    collate_fn: Callable[[list[Any]], Any] | None = None

    def __call__(self, columns: Columns) -> Any:
        """The batch of the rows.

        Raises:
            DataError: Samples that cannot be stacked; what `transform` and `collate_fn` raise goes through.
        """
        samples = build(columns, self.key)
        if self.transform is not None:
            samples = [call(self.transform, sample, self.key, self.signature) for sample in samples]
        if self.collate_fn is not None:
            return self.collate_fn(samples)
        return collate(samples, columns.ids.values())

    def build_each(self, many: Iterator[Columns], *, stopped: Callable[[], bool]) -> Iterator[Any]:
        """The batches of these columns, one each, as an ordered map (see `prefetch`)."""
        return map(self, itertools.takewhile(lambda _: not stopped(), many))


def build(columns: Columns, key: Key) -> list[Any]:
    """The samples of the rows, in the structure of the key."""
    values = {path: _values(columns, path) for path in key.paths}
    return [key.arrange(lambda path, row=row: values[path][row]) for row in range(len(columns))]  # type: ignore[misc]


def call(function: Callable[..., Any], sample: Any, key: Key, signature: str) -> Any:
    """What `function` returns for a sample that goes in by `signature`.

    Raises:
        SignatureError: No such signature.
    """
    check_signature(signature)
    if signature == "singleton":
        return function(sample)
    positional, named = _arguments(sample, key)
    if signature == "*args":
        return function(*positional, *named.values())
    if signature == "**kwargs":
        return function(**dict(zip(key.names(), [*positional, *named.values()], strict=True)))
    return function(*positional, **named)


def _arguments(sample: Any, key: Key) -> tuple[Sequence[Any], Mapping[str, Any]]:
    if key.form == "single":
        return [sample], {}
    if key.form == "tuple":
        return sample, {}
    return ([], sample) if key.form == "dict" else sample


def _values(columns: Columns, path: str) -> Sequence[Any]:
    column = columns[path]
    if column.kind != "array":
        return [_value(value) for value in column.values()]
    whole = column_tensor(columns, path)
    return [] if whole is None else whole.unbind()


def _value(value: Any) -> Any:
    return one_tensor(value) if isinstance(value, np.ndarray) else value
