"""Reads the values of one field in many documents, by their BSON types.

Numbers, dates and ObjectIds are taken out as numpy arrays, text and bytes as slices, and arrays stored as BSON by
what is in front of their data, which is the same in all of one shape. Lists of numbers of one type and length have
their values at equal distances: they are compared with what such a list looks like. Those of different lengths are
read as if they were as long as the longest, and what is behind each is left out. Lists of mixed types are walked,
one element of every list at a time. What is left is cut out as a small document of its own and decoded by `bson`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import bson
import numpy as np
from bson.binary import VECTOR_SUBTYPE

from mongotorch.codecs.arrays import dtype_name, restore, stored_array, vector_type
from mongotorch.data.decode.columns import (
    BOOL,
    DOUBLE,
    INT32,
    INT64,
    NUMBERS,
    PLAIN,
    Column,
    build,
    ends_of,
    merge,
    number_column,
    numbers,
    ragged,
    shaped,
)
from mongotorch.data.decode.raw_bson import Array, Bytes, Field, Mask, Octets, Positions, Rows, sizes, word

DOCUMENT = 0x03
LIST = 0x04
_ELEMENT = 11  # bytes of an element of a list of numbers, about
_SHORTEST = 7  # and at least
_LARGEST = 15 * 100_000  # bytes of a list whose elements have numbers of at most five digits
_EMPTY = 5  # bytes of an empty list
_WORTH = 700  # bytes of elements of one number, below which a walk costs more than `bson`
_DEEPEST = 32  # dimensions
_PADDED = 3  # times the elements that there are, which lists of different lengths may be read as
_SHORT = 4  # bits of the length of lists that are short
_COMPARED = 2**18  # bytes at a time, so that they stay in the cache
_TOGETHER = 2**13  # elements at a time, for which no memory has to be asked of the system
_LONGEST = 100_000  # elements whose number has at most five digits
NUMBER_SIZES = np.zeros(256, np.int64)
"""Bytes of a number that may be among others, by its type; 0 for other types."""
NUMBER_SIZES[[DOUBLE, INT32, INT64]] = [8, 4, 8]
_STEPS = {width: np.where(NUMBER_SIZES, NUMBER_SIZES + width, 0) for width in range(3, 8)}
_TEXT, _BINARY, _OBJECT_ID, _DATE, NULL = 0x02, 0x05, 0x07, 0x09, 0x0A
_INT32 = struct.Struct("<i")
_DATE_RANGE = (-62_135_596_800_000, 253_402_300_799_999)  # years 1 to 9999: what Python can say
_SHAPES = 16  # of arrays in one field, before the rest goes through `bson`

Part = tuple[Rows | None, Column]
"""Some rows (None: all, in order) and their column."""


def read_field(octets: Octets, field: Field, *, identity: bool) -> Column:
    """The column of a field, its rows in the order in which they were found.

    Args:
        octets: The bytes.
        field: Where its values are; one at least.
        identity: They are `_id`s: kept as `bson` gives them.

    Raises:
        BSONError, UnicodeDecodeError: A value that is not valid BSON.
    """
    if isinstance(field.kinds, int):
        return _one_type(octets, field, field.kinds, identity=identity)
    parts: list[Part] = []
    for kind in np.flatnonzero(np.bincount(field.kinds)).tolist():
        rows = np.flatnonzero(field.kinds == kind)
        parts.append((rows, _one_type(octets, field.part(rows, rows), kind, identity=identity)))
    return merge(parts, identity=identity)


def _one_type(octets: Octets, field: Field, kind: int, *, identity: bool) -> Column:
    if (column := number_column(kind, field.head)) is not None:
        return column
    if kind == NULL:
        return build([None] * field.at.total)
    if kind == _OBJECT_ID:
        return Column(kind="oid", data=octets.rows(field.at, 12).copy(), dtype="uint8")
    if kind == _DATE:
        data = word(field.head, 0).astype(np.int64)
        if _DATE_RANGE[0] <= data.min() and data.max() <= _DATE_RANGE[1]:
            return Column(kind="date", data=data, dtype="int64")
    reader = _READERS.get(kind)
    rest: Rows | None = None
    parts: list[Part] = []
    if reader is not None and not (identity and kind != _TEXT):
        parts, rest = reader(octets, field)
    if rest is None:
        return _each(octets, field, kind, identity=identity)
    if len(rest):
        parts.append((rest, _each(octets, field.part(rest, rest), kind, identity=identity)))
    return merge(parts, identity=identity)


def number_columns(kinds: Array, values: Array, count: int) -> list[Column] | None:
    """The columns of several fields of numbers that may be integers or doubles, of as many documents each.

    Args:
        kinds: Their BSON types, the fields one after the other.
        values: The eight bytes from each number on, (n, 8).
        count: How many fields these are.
    """
    each = len(kinds) // count
    together = number_column(_one_or_all(kinds), values)
    if together is None:  # large integers of one field, beside doubles of another
        parts = [slice(first, first + each) for first in range(0, len(kinds), each)]
        columns = [number_column(_one_or_all(kinds[part]), values[part]) for part in parts]
        return [column for column in columns if column is not None] if None not in columns else None
    data = np.asarray(together.data).reshape(count, each)
    if together.whole is None:
        return [Column(kind="number", data=one, dtype=together.dtype) for one in data]
    return [numbers(one, whole) for one, whole in zip(data, together.whole.reshape(count, each), strict=True)]


def _one_or_all(kinds: Array) -> int | Array:
    first = int(kinds[0])
    return first if np.count_nonzero(kinds == first) == len(kinds) else np.ascontiguousarray(kinds)


def _each(octets: Octets, field: Field, kind: int, *, identity: bool) -> Column:
    """Decode each value alone, as the only one of a document."""
    size, _ = sizes(kind, field.head)
    content, front = octets.content, bytes([kind, 0])
    cut: list[bytes | memoryview] = []
    for start, length in zip(
        field.at.values().tolist(), np.broadcast_to(size, field.at.total).tolist(), strict=True
    ):
        cut += (_INT32.pack(length + 7), front, content[start : start + length], b"\0")
    found = [document[""] for document in bson.decode_all(b"".join(cut))]
    return build(found if identity else [restore(value) for value in found], identity=identity)


def _spans(field: Field, front: int, back: int) -> Any:
    """Where the values start and end that begin with their length, `front` bytes before and `back` behind."""
    starts = field.at.values() + front
    ends = starts + word(field.head, 0, "<i4", 4) - back
    return zip(starts.tolist(), ends.tolist(), strict=True)


def _text(octets: Octets, field: Field) -> tuple[list[Part], Rows]:
    content = octets.content
    ends = field.at.values() + word(field.head, 0, "<i4", 4) + 3
    if octets.rows(Positions(len(ends), 0, base=ends), 1).any():
        raise bson.InvalidBSON("a string without its end")
    if isinstance(content, bytes):
        values = [content[start:end].decode() for start, end in _spans(field, 4, 1)]
    else:
        values = [str(content[start:end], "utf-8") for start, end in _spans(field, 4, 1)]
    return [(None, build(values))], np.empty(0, np.intp)


def _binary(octets: Octets, field: Field) -> tuple[list[Part], Rows]:
    subtypes = field.head[:, 4]
    plain = subtypes == 0
    if not plain.any():
        return _stored(octets, field, _vector_front)
    rows = np.flatnonzero(plain)
    content = octets.content
    spans = _spans(field if plain.all() else field.part(rows, rows), 5, 0)
    if isinstance(content, bytes):
        values = [content[start:end] for start, end in spans]
    else:
        values = [bytes(content[start:end]) for start, end in spans]
    parts: list[Part] = [(rows, build(values))]
    rest = np.flatnonzero(~plain)
    if not len(rest):
        return [(None, parts[0][1])], rest
    more, left = _stored(octets, field.part(rest, rest), _vector_front)
    parts += [(rest if these is None else rest[these], column) for these, column in more]
    return parts, rest[left]


def _lists(octets: Octets, field: Field) -> tuple[list[Part], Rows]:
    return read_lists(octets, field.at, word(field.head, 0, "<i4", 4))


_Front = Callable[[bytes], tuple[Array, int, int] | None]
"""Of the bytes of a value: an array like the one stored in it, and where its data starts and ends."""


def _vector_front(value: bytes) -> tuple[Array, int, int] | None:
    dtype = vector_type(value[5:7], len(value) - 7)
    if value[4] != VECTOR_SUBTYPE or dtype is None:
        return None
    return np.frombuffer(value, dtype, offset=7), 7, len(value)


def _document_front(value: bytes) -> tuple[Array, int, int] | None:
    array = stored_array(bson.decode(value))
    if array is None:
        return None
    start = len(value) - 1 - array.nbytes
    header = b"\x05data\x00" + _INT32.pack(array.nbytes) + b"\x00"
    # Else these are the same keys in another order.
    return (array, start, len(value) - 1) if value[start - len(header) : start] == header else None


def _documents(octets: Octets, field: Field) -> tuple[list[Part], Rows]:
    return _stored(octets, field, _document_front)


def _stored(octets: Octets, field: Field, front: _Front) -> tuple[list[Part], Rows]:
    """The stored arrays, those with the same bytes in front of their data together."""
    kind = field.kinds if isinstance(field.kinds, int) else int(field.kinds[0])
    size, _ = sizes(kind, field.head)
    parts: list[Part] = []
    others: list[int] = []  # that are no arrays
    left: Rows | None = None  # all
    for _ in range(_SHAPES):
        if left is not None and not len(left):
            break
        first = 0 if left is None else int(left[0])
        length = size if isinstance(size, int) else int(size[first])
        if left is None and not isinstance(size, int):
            left = np.arange(field.at.total)
        same = left if isinstance(size, int) or left is None else left[size[left] == length]
        matrix = octets.rows(field.at if same is None else field.at.select(same), length)
        found = front(matrix[0].tobytes())
        if found is None:
            others.append(first)
            left = np.arange(field.at.total)[1:] if left is None else left[1:]
            continue
        array, start, end = found
        fit = _same_front(matrix, start, end)
        if fit is not None:
            same = np.flatnonzero(fit) if same is None else same[fit]
            matrix = matrix[fit]
        parts.append((same, _array(field, matrix, array, start, end)))
        if same is None:
            return parts, np.empty(0, np.intp)
        left = np.setdiff1d(np.arange(field.at.total) if left is None else left, same, assume_unique=True)
    rest = np.arange(field.at.total) if left is None else left
    return parts, np.sort(np.concatenate([rest, np.array(others, np.intp)]))


def _same_front(matrix: Bytes, start: int, end: int) -> Mask | None:
    """Which rows have the bytes of the first one before `start` and from `end` on; None: all of them."""
    equal = [matrix[:, :start] == matrix[0, :start], matrix[:, end:] == matrix[0, end:]]
    if all(np.count_nonzero(part) == part.size for part in equal):
        return None
    fit: Mask = equal[0].all(axis=1) & equal[1].all(axis=1)
    return fit


def _array(field: Field, matrix: Bytes, like: Array, start: int, end: int) -> Column:
    data = matrix[:, start:end]
    # A view would keep the documents: only worth it where they are hardly more than the array.
    if field.at.base is None and data.shape[1] * 2 < field.at.stride:
        data = data.copy()
    shape = (len(matrix), *like.shape)
    shaped = data.view(like.dtype).reshape(shape) if data.size else np.empty(shape, like.dtype)
    return Column(kind="array", data=shaped, dtype=dtype_name(like))


_READERS: dict[int, Callable[[Octets, Field], tuple[list[Part], Rows]]] = {
    _TEXT: _text,
    _BINARY: _binary,
    LIST: _lists,
    DOCUMENT: _documents,
}


def read_lists(octets: Octets, at: Positions, lengths: Array, depth: int = 1) -> tuple[list[Part], Rows]:
    """The columns of lists of numbers, and which lists are none.

    Args:
        octets: The bytes.
        at: Where each list starts; one at least.
        lengths: The bytes of each, int32 of shape (n,).
        depth: Of lists in lists.

    Returns:
        Parts with the numbers of their rows (None: all), and the numbers of the other rows.
    """
    parts: list[Part] = []
    rest: Rows | None = None  # all
    size = int(lengths[0])
    if (lengths == size).all():
        matrix = octets.rows(at, size)
        found = _rectangular(matrix)
        if found is not None:
            column, fit = found
            if fit is None:
                return [(None, column)], np.empty(0, np.intp)
            parts, rest = [(np.flatnonzero(fit), column)], np.flatnonzero(~fit)
    elif (flat := _alike_lists(octets, at.values(), lengths)) is not None:
        column, fit = flat
        if fit is None:
            return [(None, column)], np.empty(0, np.intp)
        parts, rest = [(np.flatnonzero(fit), column)], np.flatnonzero(~fit)
    if rest is not None:
        at, lengths = at.select(rest), lengths[rest]
    walked, others = _walked(octets, at.values(), lengths, depth)
    if rest is None:
        return walked, others
    parts += [(rest if done is None else rest[done], column) for done, column in walked]
    return parts, rest[others]


def _rectangular(lists: Bytes) -> tuple[Column, Mask | None] | None:
    """Lists of as many bytes, (n, size): the column of those that are like the first, and which these are."""
    kind = int(lists[0, 4])
    if kind not in NUMBERS or (known := _looks(kind, lists.shape[1])) is None:
        return None
    content, mask, runs = known
    fit = matching(lists, content, mask)
    if fit is not None:
        if not fit.any():
            return None
        lists = lists[fit]
    dtype = NUMBERS[kind]
    first, count = runs[-1][1:3]
    data = np.empty((len(lists), first + count), PLAIN[dtype.char][1])
    for offset, begin, many, stride in runs:
        elements = lists[:, offset : offset + many * stride].reshape(len(lists), many, stride)
        data[:, begin : begin + many] = elements[:, :, stride - dtype.itemsize :].view(dtype)[:, :, 0]
    return Column(kind="number", data=data, dtype=PLAIN[dtype.char][0]), fit


def matching(lists: Bytes, content: Bytes, mask: Bytes) -> Mask | None:
    """Which rows have these bytes where the mask is set; None: all of them."""
    step = max(_COMPARED // lists.shape[1], 1)
    fit = None
    for start in range(0, len(lists), step):
        differing = np.bitwise_xor(lists[start : start + step], content)
        np.bitwise_and(differing, mask, out=differing)
        if differing.any():
            fit = np.ones(len(lists), np.bool_) if fit is None else fit
            fit[start : start + step] = ~differing.any(axis=1)
    return fit


@lru_cache(maxsize=16)
def _looks(kind: int, size: int) -> tuple[Bytes, Bytes, tuple[tuple[int, int, int, int], ...]] | None:
    """What a list of so many bytes looks like if it holds only this type: content, mask, runs of values.

    The keys of a BSON list are "0", "1", ...: the stride of the values grows with the digits of the key. A run is
    (offset, first number, count, stride).
    """
    width = NUMBERS[kind].itemsize
    content, mask = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    content[:4] = np.frombuffer(_INT32.pack(size), np.uint8)
    mask[:4] = mask[-1] = 0xFF
    at, first, digits = 4, 0, 1
    runs = []
    while at < size - 1:
        head = 2 + digits
        count, rest = divmod(size - 1 - at, head + width)
        most = 10**digits - first
        if rest and count < most:
            return None
        count = min(count, most)
        end = at + count * (head + width)
        rows, covered = content[at:end].reshape(count, -1), mask[at:end].reshape(count, -1)
        rows[:, 0], covered[:, :head] = kind, 0xFF
        if kind == BOOL:
            covered[:, head] = 0xFE
        for digit in range(digits):
            rows[:, 1 + digit] = np.arange(first, first + count) // 10 ** (digits - 1 - digit) % 10 + 0x30
        runs.append((at, first, count, head + width))
        at, first, digits = end, first + count, digits + 1
    return (content, mask, tuple(runs)) if runs else None


def _alike_lists(octets: Octets, starts: Array, lengths: Array) -> tuple[Column, Mask | None] | None:
    """Lists of different lengths: the column of those that hold one type only, and which these are."""
    empty = lengths == 5
    kinds = octets.rows(Positions(len(starts), 4, base=starts), 1)[:, 0]
    kind = int(kinds[int(np.argmin(empty))])
    longest = int(lengths.max())
    if kind not in NUMBERS or longest > 4 * _LONGEST:
        return None
    offsets = _elements(kind, 1 << (longest // (3 + NUMBERS[kind].itemsize)).bit_length())[0]
    counts = np.searchsorted(offsets, lengths - 5)
    fit: Mask = ((kinds == kind) | empty) & (offsets.take(counts, mode="clip") == lengths - 5)
    if np.count_nonzero(fit) * 2 < len(fit):  # mixed types, some of which have such a length by chance
        return None
    fit &= octets.rows(Positions(len(starts), 0, base=starts + lengths - 1), 1)[:, 0] == 0
    parts: list[Part] = []
    # Lists of about one length together.
    scale = np.frexp(counts)[1].clip(min=_SHORT) * (len(counts) * int(counts.max()) > _PADDED * int(counts.sum()))
    for size in np.flatnonzero(np.bincount(scale[fit])).tolist():
        rows = np.flatnonzero(fit & (scale == size))
        column, same = _side_by_side(octets, starts[rows], kind, offsets, counts[rows])
        fit[rows[~same]] = False
        parts.append((rows[same], column))
    column = parts[0][1] if len(parts) == 1 else merge(parts)
    return column, None if np.count_nonzero(fit) == len(fit) else fit


def _side_by_side(octets: Octets, starts: Array, kind: int, offsets: Array, counts: Array) -> tuple[Column, Mask]:
    """The column of lists of one type, read as if they all were as long as the longest; and which lists are such.

    Args:
        octets: The bytes.
        starts: Where each list starts.
        kind: The type of its numbers.
        offsets: Where each element is behind the length of a list, see `_elements`.
        counts: How many elements each list has.
    """
    most, dtype = int(counts.max()), NUMBERS[kind]
    known = _looks(kind, int(offsets[most + 1]) + _EMPTY)
    assert known is not None  # noqa: S101 - for the type checker; there is a list of that size
    # As far as the type of the element behind the last one, which the end of every list differs from.
    size = int(offsets[most]) + 1
    content, mask, runs = known[0][4 : size + 4], known[1][4 : size + 4], known[2]
    name, plain = PLAIN[dtype.char]
    data, same = np.empty((len(starts), most), plain), np.empty(len(starts), np.bool_)
    step = max(_COMPARED // size, 1)
    for start in range(0, len(starts), step):
        part = slice(start, start + step)
        lists = octets.rows(Positions(len(starts[part]), 4, base=starts[part]), size)
        for at, first, count, stride in runs:
            count = min(count, most - first)
            elements = lists[:, at - 4 : at - 4 + count * stride].reshape(len(lists), count, stride)
            data[part, first : first + count] = elements[:, :, stride - dtype.itemsize :].view(dtype)[:, :, 0]
        differing = np.bitwise_and(lists, mask) != content
        same[part] = differing.argmax(axis=1) == offsets.take(counts[part])
    there = np.arange(most, dtype=np.int32) < np.where(same, counts, 0).astype(np.int32)[:, None]
    return ragged(Column(kind="number", data=data[there], dtype=name), ends_of(counts[same])), same


@lru_cache(maxsize=16)
def _elements(kind: int, count: int) -> tuple[Array, Array, Array]:
    """Where the elements of a list of this type begin and the last one ends, and what their headers are.

    Returns:
        Offsets behind the length of the list, (count + 1,), and of each element its header as a number, and the
        bits of that.
    """
    heads = np.array([len(str(number)) + 2 for number in range(count)], np.int64)
    headers = [int.from_bytes(bytes([kind]) + b"%d\0" % number, "little") for number in range(count)]
    return (
        ends_of(heads + (NUMBERS[kind].itemsize if kind in NUMBERS else 0)),
        np.array(headers, np.uint64),
        (8 * heads).astype(np.uint64),
    )


def _walked(octets: Octets, starts: Array, lengths: Array, depth: int) -> tuple[list[Part], Rows]:
    """The column of lists of numbers, or of lists, that are walked an element at a time, all lists at once.

    Returns:
        Its part, if any, and the rows that have to be read in another way.
    """
    nested = _are_nested(octets, starts)
    ends = starts + lengths - 1
    fit = np.zeros(len(starts), np.bool_)
    found: list[tuple[Rows, Array, Mask]] = []
    # Lists of about one length together: a long one would be walked with all others waiting.
    scale = np.frexp(lengths / lengths.max())[1] - 1 if lengths.mean() * 4 < lengths.max() else lengths * 0
    scale -= scale.min()
    for size in np.flatnonzero(np.bincount(scale)).tolist() if depth < _DEEPEST else ():
        rows = np.flatnonzero(scale == size)
        element = _first_element(octets, int(starts[rows[0]])) if nested else _ELEMENT
        longest = int(lengths[rows].max())
        if int(lengths[rows].sum()) * element < _WORTH * longest or (longest > _LARGEST and not nested):
            continue
        at = _positions(octets, starts[rows] + 4, min(longest // _SHORTEST, _LONGEST), nested=nested)
        fit[rows] = (at[-1] == ends[rows]) & (octets.array.take(ends[rows], mode="clip") == 0)
        found.append((rows, at[:-1], at[1:] != at[:-1]))
    if len(found) and fit.any():
        column = _elements_column(octets, found, fit, depth, nested=nested)
        if column is not None:
            chosen = np.flatnonzero(fit)
            return [(None if len(chosen) == len(fit) else chosen, column)], np.flatnonzero(~fit)
    return [], np.arange(len(starts))


def _are_nested(octets: Octets, starts: Array) -> bool:
    """Whether most lists begin with a list."""
    kinds = octets.array.take(starts + 4, mode="clip")
    return bool(np.count_nonzero(kinds == LIST) * 2 > len(kinds))


def _first_element(octets: Octets, start: int) -> int:
    """The bytes of the first element of a list of lists."""
    head = bytes(octets.content[start + 7 : start + 11])
    return _INT32.unpack(head)[0] + 3 if len(head) == 4 else 0


def _positions(octets: Octets, at: Array, most: int, *, nested: bool) -> Array:
    """Where the elements of each list begin, (elements + 1, n); where no further one is, it stays."""
    found = [at]
    for number in range(most):
        width = 2 + len(str(number))
        kinds = octets.array.take(at, mode="clip")
        if nested:
            inner = word(octets.rows(Positions(len(at), width, base=at), 4), 0, "<i4", 4)
            step = np.where((kinds == LIST) & (inner >= _EMPTY), inner + width, 0)
        else:
            step = _STEPS[width].take(kinds)
        if not np.count_nonzero(step):
            break
        at = at + step
        found.append(at)
    return np.stack(found)


def _elements_column(
    octets: Octets, found: list[tuple[Rows, Array, Mask]], fit: Mask, depth: int, *, nested: bool
) -> Column | None:
    """The column of the lists that are fit; those of which an element has a wrong name are not, from now on."""
    counts = np.zeros(len(fit), np.int64)
    for rows, _, there in found:
        counts[rows] = np.count_nonzero(there, axis=0)
    counts[~fit] = 0
    ends = ends_of(counts)
    at = _by_list(found, fit, ends)
    if not len(at):
        return None
    most = int(counts.max())
    alike = most if len(at) == most * len(fit) else None
    number = None if alike else np.arange(ends[-1]) - np.repeat(ends[:-1], counts)
    kinds, words, wrong = _read_elements(octets, at, most, number)
    if len(wrong):
        fit[np.searchsorted(ends, wrong, side="right") - 1] = False
        return _elements_column(octets, found, fit, depth, nested=nested) if fit.any() else None
    if nested:
        heads = _elements(0, 1 << most.bit_length())[2] // np.uint64(8)
        width = np.tile(heads[:most], len(fit)) if number is None else heads.take(number)
        return _inner(octets, at + width.astype(np.int64), ends_of(counts[fit]), depth)
    flat = number_column(_one_or_all(kinds), words.view(np.uint8).reshape(-1, 8))
    return None if flat is None else ragged(flat, ends_of(counts[fit]))


def _read_elements(octets: Octets, at: Array, most: int, number: Array | None) -> tuple[Bytes, Array, Rows]:
    """Types and first eight bytes of elements, and which of them have another name than their number.

    Args:
        octets: The bytes.
        at: Where each element is.
        most: Elements of a list, at most.
        number: The number of each; None: each list has `most`, one after the other.
    """
    kinds, words = np.empty(len(at), np.uint8), np.empty(len(at), np.uint64)
    _, headers, bits = _elements(0, 1 << most.bit_length())
    names = (np.uint64(1) << bits) - np.uint64(256)  # all of a header but the type
    wrong = [np.empty(0, np.intp)]
    step = _TOGETHER if number is not None else max(_TOGETHER // most, 1) * most
    for start in range(0, len(at), step):
        part = slice(start, start + step)
        matrix = octets.rows(Positions(len(at[part]), 0, base=at[part]), 16)
        # A name is in the lowest bits of the first eight bytes, behind the type, and the value comes behind.
        first, second, into = word(matrix, 0), word(matrix, 8), words[part]
        if number is None:
            first, second, into = (one.reshape(-1, most) for one in (first, second, into))
            header, mask, size = headers[:most], names[:most], bits[:most]
        else:
            header, mask, size = (known.take(number[part]) for known in (headers, names, bits))
        other: Array = first ^ header
        other &= mask
        if np.count_nonzero(other):
            wrong.append(np.flatnonzero(other) + start)
        np.left_shift(second, np.uint64(64) - size, out=other)
        np.bitwise_or(np.right_shift(first, size), other, out=into)
        kinds[part] = matrix[:, 0]
    return kinds, words, np.concatenate(wrong)


def _by_list(found: list[tuple[Rows, Array, Mask]], fit: Mask, ends: Array) -> Array:
    """The positions of all elements, list by list."""
    rows, at, there = found[0]
    if len(found) == 1 and len(rows) * len(at) == ends[-1]:  # all of one length
        return np.ascontiguousarray(at.T).reshape(-1)
    whole = np.empty(ends[-1], np.int64)
    for rows, at, there in found:
        there = there & fit[rows]
        targets = ends[:-1][rows] + np.arange(len(at))[:, None]
        whole[targets[there]] = at[there]
    return whole


def _inner(octets: Octets, at: Array, ends: Array, depth: int) -> Column | None:
    """The column of lists that hold as many lists each."""
    counts = np.diff(ends)
    if (counts != counts[0]).any():
        return None
    inner = Positions(len(at), 0, base=at)
    parts, others = read_lists(octets, inner, word(octets.rows(inner, 4), 0, "<i4", 4), depth + 1)
    column = None if len(others) else merge(parts)
    if column is None or column.kind != "number":
        return None
    shape = (len(counts), int(counts[0]), *np.shape(column.data)[1:])
    return shaped(column, shape)
