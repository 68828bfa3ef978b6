"""Cuts a select into ranges of `_id` of about equal size, once, and keeps the bounds as a plan; decides dtypes.

Collections of up to 200,000 documents are walked, so that two databases with the same documents have the same
plan; larger ones are sampled, and the plan that was stored first is everybody's. A resumed run asks for its plan
by digest.

`$sample` picks documents by a random walk down a tree, which visits a part of a collection that grew unevenly far
too seldom: of a million documents inserted in one go it leaves ranges of 50,000 where there should be 1,000. Where
`_id`s ascend as documents were inserted, the server's record numbers say how many documents lie between two of
them: bounds are chosen by those, and the gaps that are still too wide are cut at equal distances, which needs no
document: a bound is any value that an `_id` may have. Where `_id`s lie far apart, so that this could leave most
documents on one side, they are walked first, the widest gaps before others, for a limited time. ObjectIds that
one process makes count up, but jump with each second: such a bound is one of few values, which are looked for
together.

Guarantees: the ranges of a plan do not overlap and leave no gap between the first and the last `_id` that the
select had when the plan was made; a plan is never changed; finding one takes a bounded time, whatever the
collection's size.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, final

import bson
from bson import Int64, ObjectId
from pymongo.errors import DuplicateKeyError, PyMongoError

from mongotorch.codecs import WRITTEN, check_format
from mongotorch.data.decode import (
    FLOAT,
    Column,
    Reply,
    decode,
    encode,
    offsets,
    same_type,
    sort_key,
)
from mongotorch.data.prefetch import close_iterator, map_ordered
from mongotorch.data.read.bad_documents import Form, common_forms, decode_fitting
from mongotorch.data.read.reader import DatabaseAccess, IdRange, Reader
from mongotorch.errors import DataError, EmptySelectError, FieldMissingError
from mongotorch.mongo.server_features import Later, clock_of, records, utc_now
from mongotorch.query import Query
from mongotorch.split import ByStoredFold

_SAMPLES = 5  # a range: with fewer the ranges differ too much in size
_SHARE = 0.04  # of a collection that is sampled at most: from 5 % on the server scans it all
_MOST = 2_500  # samples, where gaps can be cut; each costs some 60 microseconds
_MOST_UNCUT = 100_000  # samples, where they cannot
_FEWEST = 8  # samples; with fewer the select is walked
_ASCENDING = 0.95  # of neighbours, for record numbers to mean something
_WIDE = 1.75  # times the size that a range is to have, from where on a gap is walked
_DENSE = 1.5  # times the documents of a gap, up to which its values have documents everywhere
_WALK_S = 0.1  # seconds that walking may take
_SECONDS = 8  # that ObjectIds jump in a gap, up to which its bounds are looked for
_MOST_LIKELY = 5_000  # bounds that are looked for; each costs some 10 microseconds
_COUNTER = 2**24  # values of the last part of an ObjectId, which counts


def sampled(reader: Reader, whole: IdRange, rows: int, size: int, *, most: int) -> tuple[Any, ...] | None:
    """The first `_id` of each range, ascending; None where too few documents of a sample match the select.

    Args:
        reader: Of the select.
        whole: All of the select.
        rows: Documents that a range should have.
        size: Documents of the collection.
        most: Ranges, at most.
    """
    rows = max(rows, -(-size // most))
    asked = max(min(_SAMPLES * size // rows, int(size * _SHARE), _MOST_UNCUT), _FEWEST)
    sample_size = min(asked, _MOST) if _can_be_cut(whole.lower, whole.upper) else asked
    ids = reader.sample(sample_size, whole)
    if len(ids) < _FEWEST:
        return None
    inside = _each_once(whole.lower, ids)
    numbers = reader.record_numbers([*inside, whole.upper])
    gaps = [after - before for before, after in itertools.pairwise(numbers)]
    if not gaps or sum(gap > 0 for gap in gaps) < _ASCENDING * len(gaps):
        if sample_size < asked:
            inside = _each_once(whole.lower, reader.sample(asked, whole))
        step = max(round(asked * rows / size), 1)
        return tuple(inside[::step])
    # Record numbers count the documents of the collection, of which the select may have a part only.
    target = rows * sample_size / len(ids)
    chosen, sizes = _evenly(inside, gaps, target)
    return tuple(_walked(reader, whole, chosen, sizes, target, rows))


def _each_once(first: Any, ids: list[Any]) -> list[Any]:
    """The first `_id` and those of a sample, of which the same ones are next to each other."""
    return [first, *(next(same) for _, same in itertools.groupby(ids, sort_key))]


def _evenly(ids: list[Any], gaps: list[int], target: float) -> tuple[list[Any], list[int]]:
    """The `_id`s that start ranges of about `target` documents, and how many lie behind each."""
    chosen: list[Any] = []
    sizes: list[int] = []
    for document_id, gap in zip(ids, gaps, strict=True):
        if not sizes or sizes[-1] >= target * 0.9:
            chosen.append(document_id)
            sizes.append(0)
        sizes[-1] += max(gap, 0)
    return chosen, sizes


def _walked(
    reader: Reader, whole: IdRange, starts: list[Any], sizes: list[int], target: float, rows: int
) -> Iterator[Any]:
    """The same starts, and more of them in wide gaps, the widest first as long as there is time; see `_cut`."""
    wide = [n for n, size in enumerate(sizes) if size > _WIDE * target]
    uppers = [*starts[1:], whole.upper]
    dense = [n for n in wide if _distance(starts[n], uppers[n]) <= _DENSE * sizes[n]]
    deadline = time.monotonic() + _WALK_S

    def more(n: int) -> tuple[int, list[Any]]:
        found: list[Any] = []
        is_walked = False
        if time.monotonic() < deadline:
            gap = IdRange(lower=starts[n], upper=uppers[n], closed=False, uniform=whole.uniform)
            is_walked = True
            for start in reader.walk(gap, rows):
                found.append(start)
                if time.monotonic() > deadline:
                    is_walked = False
                    break
        if not is_walked:
            left = sizes[n] / target - len(found)
            found += _cut(found[-1] if found else starts[n], uppers[n], round(left))
        return n, found

    between = {n: _cut(starts[n], uppers[n], round(sizes[n] / target)) for n in dense}
    sparse = sorted(set(wide) - between.keys(), key=lambda n: -sizes[n])
    likely = {n: _likely(starts[n], uppers[n], sizes[n], round(sizes[n] / target)) for n in sparse}
    asked = itertools.islice(itertools.chain.from_iterable(likely.values()), _MOST_LIKELY)
    present = set(reader.present(list(asked)))
    between |= {n: found for n, ids in likely.items() if (found := sorted(present.intersection(ids)))}
    walked = (n for n in sparse if n not in between)
    between |= map_ordered(more, walked, threads=reader.threads, most=64, most_bytes=64, weigh=lambda _: 1)
    for n, start in enumerate(starts):
        yield start
        yield from between.get(n, [])


def _can_be_cut(lower: Any, upper: Any) -> bool:
    kinds = {int if type(value) is Int64 else type(value) for value in (lower, upper)}
    return kinds in ({int}, {ObjectId})


def _cut(lower: Any, upper: Any, count: int) -> list[Any]:
    """What cuts the values between two `_id`s into so many parts of the same length; none where nothing can."""
    if not _can_be_cut(lower, upper):
        return []
    first, last = _number(lower), _number(upper)
    values = [first + (last - first) * n // count for n in range(1, count)]
    inside = [value for value in dict.fromkeys(values) if first < value < last]
    return [ObjectId(value.to_bytes(12, "big")) for value in inside] if isinstance(lower, ObjectId) else inside


def _likely(lower: Any, upper: Any, size: int, count: int) -> list[ObjectId]:
    """ObjectIds among which are some that cut so many documents of one process into so many parts of one size."""
    if not (isinstance(lower, ObjectId) and isinstance(upper, ObjectId)):
        return []
    (first, process, start), (last, other, stop) = (
        (int.from_bytes(one[:4], "big"), one[4:9], int.from_bytes(one[9:], "big"))
        for one in (lower.binary, upper.binary)
    )
    counted = (stop - start) % _COUNTER
    if process != other or last - first > _SECONDS or counted > _DENSE * size:
        return []
    counters = [(start + counted * n // count) % _COUNTER for n in range(1, count)]
    made = (
        ObjectId(second.to_bytes(4, "big") + process + counter.to_bytes(3, "big"))
        for second in range(first, last + 1)
        for counter in counters
    )
    return [one for one in made if lower < one < upper]  # those behind a counter that began again may be outside


def _distance(lower: Any, upper: Any) -> float:
    """How many values an `_id` may have between two of them; infinite where that is not a number of them."""
    return _number(upper) - _number(lower) if _can_be_cut(lower, upper) else math.inf


def _number(value: Any) -> int:
    return int.from_bytes(value.binary, "big") if isinstance(value, ObjectId) else int(value)


_log = logging.getLogger("mongotorch.data")
COLLECTION = "mt.plans"
MOST_SHUFFLED_RANGES = 64  # ranges that are shuffled together, at most
_WALKED = 200_000  # documents; more are sampled
_RANGES = 50_000  # at most, so that a plan fits into a document
_TOUCHED = timedelta(days=1)
_PROBED = 64  # documents whose size is measured
_SAMPLED = 2048  # documents at each end that decide dtypes
_SAMPLED_BYTES = 2**22  # of them, at most


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a select is cut.

    Attributes:
        digest: Names the plan; 64 hexadecimal digits.
        starts: The first `_id` of each range, ascending; never empty.
        last: The last `_id` of the last range.
        rows: About how many documents a range has.
        window: How many ranges are shuffled together.
        exact: Whether each range, but for the last, had exactly `rows` documents when the plan was made.
    """

    digest: str
    starts: tuple[Any, ...]
    last: Any
    rows: int
    window: int
    exact: bool = False

    def __len__(self) -> int:
        return len(self.starts)

    def counted(self, index: int) -> int | None:
        """How many documents a range had when the plan was made; None where they were not counted."""
        return self.rows if self.exact and index < len(self.starts) - 1 else None

    @property
    def whole(self) -> IdRange:
        """The bounds of all ranges together."""
        uniform = same_type(self.starts[0], self.last)
        return IdRange(lower=self.starts[0], upper=self.last, closed=True, uniform=uniform)

    def bounds(self, index: int) -> IdRange:
        """The bounds of a range."""
        final_one = index == len(self.starts) - 1
        return IdRange(
            lower=self.starts[index],
            upper=self.last if final_one else self.starts[index + 1],
            closed=final_one,
            uniform=same_type(self.starts[0], self.last),
        )


@final
@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What bounds a plan, as the trainer and the settings give it."""

    prefetch_size: int
    prefetch_factor: int
    prefetch_bytes: int

    def cut(self, row_bytes: float) -> tuple[int, int]:
        """Documents a range and ranges a window, for documents of so many bytes.

        One window is served while the next is put together, so each may have half of the bounds.
        """
        most = self._most(row_bytes)
        rows = max(min(self.prefetch_size, most // 2), 1)
        return rows, self._together(rows, most)

    def window(self, rows: int, row_bytes: float) -> int:
        """How many ranges of so many documents are shuffled together, for documents of so many bytes."""
        return self._together(rows, self._most(row_bytes))

    def _most(self, row_bytes: float) -> int:
        return max(int(self.prefetch_bytes / 2 / max(row_bytes, 1.0)), 1)

    def _together(self, rows: int, most: int) -> int:
        return max(min(MOST_SHUFFLED_RANGES, self.prefetch_factor // 2, most // rows), 1)


def make_plan(database: Any, reader: Reader, sizes: Sizes) -> Plan:
    """Find the ranges of a select, or the plan that was stored for it.

    Raises:
        EmptySelectError: The select matches no document.
        ServerUnavailableError: The server cannot be read.
    """
    ids, row_bytes = reader.probe(_PROBED)
    ends = reader.ends() if ids is None else (ids[0], ids[-1]) if ids else None
    if ends is None:
        raise EmptySelectError(f"the select matches no document in collection {reader.query.collection!r}")
    rows, window = sizes.cut(row_bytes)
    whole = IdRange(lower=ends[0], upper=ends[1], closed=True, uniform=same_type(*ends))
    size = reader.size() if ids is None else len(ids)
    if size > _WALKED:
        parts = [*ends, size, rows, window]
        if not _can_be_cut(*ends):  # earlier releases put texts into another order than some collations do
            parts.append("sorted by the server")
        request = _digest(reader.query, parts)
        stored = load_plan(database, request, reader.query)
        if stored is not None and (stored.starts[0], stored.last) == ends:
            return stored
        if (found := sampled(reader, whole, rows, size, most=_RANGES)) is not None:
            rows, window = _widened(sizes, row_bytes, rows, -(-size // _RANGES), window)
            plan = Plan(digest=request, starts=found, last=ends[1], rows=rows, window=window)
            return _store(database, plan, reader.query)
    walked = (whole.lower, *(reader.walk(whole, rows) if ids is None else ids[rows::rows]))
    # More ranges than a document can hold become fewer, larger ones.
    step = -(-len(walked) // _RANGES)
    starts = walked[::step]
    rows, window = _widened(sizes, row_bytes, rows, rows * step, window)
    digest = _digest(reader.query, [*starts, ends[1], rows, window])
    plan = Plan(digest=digest, starts=starts, last=ends[1], rows=rows, window=window, exact=True)
    return _store(database, plan, reader.query)


def _widened(sizes: Sizes, row_bytes: float, rows: int, least: int, window: int) -> tuple[int, int]:
    """Documents a range and ranges a window, where a range has to have so many documents at least."""
    return (rows, window) if least <= rows else (least, sizes.window(least, row_bytes))


def load_plan(database: Any, digest: str, query: Query) -> Plan | None:
    """The plan of a digest, or None where it is not stored, or was changed since. Raises: FormatError."""
    found = records(database, COLLECTION).find_one({"_id": digest})
    if found is None:
        return None
    check_format(found, "plan")
    plan = Plan(
        digest=digest,
        starts=tuple(found["starts"]),
        last=found["last"],
        rows=found["rows"],
        window=found["window"],
        exact=found.get("exact", False),
    )
    # A plan of counted ranges has the digest of them; one of sampled ranges that of what was asked.
    if plan.exact and _digest(query, [*plan.starts, plan.last, plan.rows, plan.window]) != digest:
        _log.warning("plan %s in %s is not what was stored, and is not used", digest, COLLECTION)
        return None
    _touch(database, found)
    return plan


def resume_plan(database: Any, reader: Reader, sizes: Sizes, digest: str) -> Plan:
    """The plan that a stream stopped in.

    Raises:
        DataError: It is not stored (a read-only user), and the documents have changed since.
    """
    plan = load_plan(database, digest, reader.query) or make_plan(database, reader, sizes)
    if plan.digest != digest:
        raise DataError(
            f"plan {digest[:12]}… of the stopped stream is not in {COLLECTION!r}, and the documents or "
            "the prefetch settings have changed since; start a new epoch, or use the query that it stopped in"
        )
    return plan


@final
class RunDtypes:
    """The dtype of each field for a whole run, shared by all of its streams.

    It is decided once, when the first stream is read, by a sample of the first and the last documents of the
    select, of whatever fold.

    """

    def __init__(self) -> None:
        self._decided: dict[str, str] | None = None
        self._forms: dict[str, Form] | None = None
        self._access: DatabaseAccess | None = None

    def bind(self, access: DatabaseAccess) -> None:
        """Let the documents of this stream decide, unless there is one before it."""
        self._access = self._access or access

    def of(
        self, access: DatabaseAccess, paths: Sequence[str], defaults: Mapping[str, Any] | None = None
    ) -> Mapping[str, str]:
        """The dtype of each of these fields that holds numbers, its default among them.

        Raises:
            DataError: A document is not valid BSON.
            ServerUnavailableError: The server cannot be read.
        """
        if self._decided is None:
            self._decided = _decided(_sample(self._access or access), paths, defaults or {})
        return self._decided

    def forms(
        self, access: DatabaseAccess, paths: Sequence[str], defaults: Mapping[str, Any] | None = None
    ) -> Mapping[str, Form]:
        """The form of each of these fields that becomes a tensor, as most documents of the sample have it.

        Raises: see `of`.
        """
        if self._forms is None:
            replies, known = _sample(self._access or access), defaults or {}
            self._forms = common_forms(decode_fitting(replies, paths, defaults=known, dtypes={}, forms={}))
        return self._forms

    def forms_state(self, paths: Sequence[str]) -> list[Any] | None:
        """The forms that were decided, for a stream that goes on later; None before they were."""
        return None if self._forms is None else [self._forms.get(path) for path in paths]

    def load_forms(self, state: list[Any] | None, paths: Sequence[str]) -> None:
        """Keep the forms that an earlier stream of these fields had decided."""
        if state is not None:
            self._forms = {path: tuple(form) for path, form in zip(paths, state, strict=True) if form is not None}

    def state(self, paths: Sequence[str]) -> str | None:
        """What was decided, in a few characters, for a stream that goes on later; None before it was."""
        if self._decided is None:
            return None
        return "".join(_LETTERS.get(self._decided.get(path, ""), "-") for path in paths)

    def load(self, state: str | None, paths: Sequence[str]) -> None:
        """Keep what an earlier stream of these fields had decided."""
        if state is not None:
            names = {letter: name for name, letter in _LETTERS.items()}
            self._decided = {path: names[one] for path, one in zip(paths, state, strict=True) if one in names}


_LETTERS = {FLOAT: "f", "int64": "i", "bool": "b"}


def _sample(access: DatabaseAccess) -> list[Reply]:
    """Documents of the select, of all its folds."""
    query = access.query if access.query.fold_name is None else replace(access.query, fold_name=None)
    reader = access.reader(query)
    if query.is_pipeline or query.limited is not None or query.skipped:
        groups = reader.own_order(0, _SAMPLED)
        try:
            return next(groups, [])
        finally:
            close_iterator(groups)
    first = reader.head(_PROBED)
    count = sum(1 for reply in first for _ in offsets(reply))
    rows = min(int(_SAMPLED_BYTES * max(count, 1) / max(sum(map(len, first)), 1)), _SAMPLED)
    if count < _PROBED:
        return first
    return [*(first if rows <= _PROBED else reader.head(rows)), *reader.head(max(rows, _PROBED), last=True)]


def _decided(replies: list[Reply], paths: Sequence[str], defaults: Mapping[str, Any]) -> dict[str, str]:
    types = {path: set(_leaf_types(defaults.get(path))) for path in paths}
    try:
        columns = decode(replies, paths, defaults=defaults)
        for path in paths if len(columns) else ():
            types[path] |= _types(columns[path])
    except FieldMissingError:  # which reading says of the first document that is read
        for document in (bson.decode(reply[start:end]) for reply in replies for start, end in offsets(reply)):
            for path in paths:
                types[path].update(_leaf_types(_lookup(document, path)))
    # A field with floats holds floats, else one with integers integers.
    chosen = {path: next((dtype for dtype in _LETTERS if dtype in found), "") for path, found in types.items()}
    return {path: dtype for path, dtype in chosen.items() if dtype}


def _types(column: Column) -> set[str]:
    if column.plain:
        return {FLOAT if column.dtype == "float64" else column.dtype}
    return set() if column.kind in ("array", "date", "oid") else set(_leaf_types(column.values()))


def _lookup(document: Any, path: str) -> Any:
    for name in path.split("."):
        document = document.get(name) if isinstance(document, dict) else None
    return document


def _leaf_types(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _leaf_types(item)
    elif isinstance(value, bool | int | float):
        yield "bool" if isinstance(value, bool) else FLOAT if isinstance(value, float) else "int64"


def _store(database: Any, plan: Plan, query: Query) -> Plan:
    document = {
        "_id": plan.digest,
        **WRITTEN,
        "starts": list(plan.starts),
        "last": plan.last,
        "rows": plan.rows,
        "window": plan.window,
        "exact": plan.exact,
    }
    try:
        stored = load_plan(database, plan.digest, query)  # most plans are there: those of every run but the first
        if stored is not None:
            return plan if plan.exact else stored  # the digest of an exact one is that of its ranges
        records(database, COLLECTION).insert_one(document)
    except DuplicateKeyError:
        stored = load_plan(database, plan.digest, query)
        return plan if stored is None or plan.exact else stored
    except PyMongoError:  # a read-only user can stream, only not resume after changes
        return plan
    _touch(database, document)
    return plan


def _touch(database: Any, document: Mapping[str, Any]) -> None:
    """Keep when a plan was used last, to about a day: garbage collection removes those that nobody uses."""
    used, clock = document.get("used"), clock_of(database)
    if isinstance(used, datetime) and abs(utc_now() - used) < _TOUCHED:
        return
    with contextlib.suppress(PyMongoError), clock.alone():  # a read-only user uses it as well
        records(database, COLLECTION).update_one({"_id": document["_id"]}, clock.update({"used": Later()}))


def _digest(query: Query, parts: list[Any]) -> str:
    # As releases wrote it that knew stored folds alone, so that their plans are found.
    named = replace(query, split=query.split or ByStoredFold(hashes=False)) if query.fold_name else query
    content = {"collection": query.collection, "where": named.where, "parts": parts}
    return hashlib.sha256(encode(content)).hexdigest()
