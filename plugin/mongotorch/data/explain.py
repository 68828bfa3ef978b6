"""Says what a stream will do before it does it: how much it reads, how fast, by which index, and its bottleneck.

Numbers come from asking this server and reading a few ranges now, not from a table; what cannot be known
(mongomock has no query plans) is None and not a guess.

Guarantees: nothing of the user's data is changed; only the plan of ranges is stored, as the stream itself would.
"""

from __future__ import annotations

import itertools
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

from mongotorch.data.prefetch import close_iterator
from mongotorch.data.read import Reader, count
from mongotorch.data.stream.batches import SampleBuilder, batch_of, gathered
from mongotorch.data.stream.shuffle import Order
from mongotorch.data.stream.spec import StreamSpec
from mongotorch.data.stream.stream import Stream
from mongotorch.data.stream.windows import WindowReader, open_windows
from mongotorch.mongo.server_features import is_mock
from mongotorch.notebook import html_pairs

_WIDTH: Final = 80  # characters of a line of the text


@final
@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was measured on a few ranges.

    Attributes:
        rows: Documents read.
        raw_bytes: Their BSON, as projected.
        memory_bytes: What they are in memory.
        read_s: Seconds until the server had given them.
        decode_s: Seconds until they were tensors.
        build_s: Seconds that building samples took; 0 where none are built.
        kinds: The kind of each column: `number`, `array`, `object` and the like, and whether it is of lists.
    """

    rows: int
    raw_bytes: int
    memory_bytes: int
    read_s: float
    decode_s: float
    build_s: float
    kinds: Mapping[str, tuple[str, bool]]


def probe(windows: WindowReader, spec: StreamSpec, seconds: float) -> Probe:
    """Read ranges, in the order of an epoch, for about so many seconds, two at least where there are two."""
    order = Order(seed=spec.seed, epoch=0, shuffle=spec.shuffle, window=windows.window)
    rows = raw_bytes = memory = 0
    read = decoded = built = 0.0
    kinds: Mapping[str, tuple[str, bool]] = {}
    ranges = windows.replies(number for window in windows.windows(order) for number in window.ranges)
    start = time.perf_counter()
    for replies in itertools.islice(ranges, 1000):
        arrived = time.perf_counter()
        columns = windows.decode(replies)
        done = time.perf_counter()
        if len(columns):
            kinds = {path: _kind(columns, path) for path in columns.paths}
            _batch(columns, spec)
            built += time.perf_counter() - done if spec.builds_samples else 0.0
        now = time.perf_counter()
        rows, raw_bytes, memory = rows + len(columns), raw_bytes + sum(map(len, replies)), memory + columns.nbytes
        read, decoded = read + arrived - start, decoded + done - arrived
        if read + decoded + built > seconds:
            break
        start = now
    close_iterator(ranges)
    return Probe(
        rows=rows,
        raw_bytes=raw_bytes,
        memory_bytes=memory,
        read_s=read,
        decode_s=decoded,
        build_s=built,
        kinds=kinds,
    )


def _kind(columns: Any, path: str) -> tuple[str, bool]:
    column = columns[path]
    return column.kind, column.kind == "number" and getattr(column.data, "ndim", 1) > 1


def _batch(columns: Any, spec: StreamSpec) -> Any:
    """What the stream makes of a range; it raises what the stream would raise."""
    if spec.builds_samples:
        return SampleBuilder(
            key=spec.key, transform=spec.transform, signature=spec.signature, collate_fn=spec.collate_fn
        )(columns)
    rows = gathered([columns], None)
    return batch_of([(rows, 0, len(rows))], spec.key)


@final
@dataclass(frozen=True, kw_only=True)
class Lookup:
    """How the server finds the documents of one range.

    Attributes:
        stages: Of its plan, from the outermost in: `FETCH`, `IXSCAN` and the like.
        index: The fields of the index; empty for a scan of the collection.
        examined: Documents it looked at for one that matches.
    """

    stages: tuple[str, ...]
    index: tuple[str, ...]
    examined: float


def lookup(windows: WindowReader, reader: Reader) -> Lookup | None:
    """Ask the server how it reads one range of the plan; None where it cannot be asked."""
    plan = windows.plan
    answer = None if plan is None else reader.explain_read(plan.bounds(len(plan) // 2))
    if answer is None:
        return None
    stages = list(_stages(answer.get("queryPlanner", {}).get("winningPlan", {})))
    stats = answer.get("executionStats", {})
    index = next((tuple(stage["keyPattern"]) for stage in stages if "keyPattern" in stage), ())
    examined = stats.get("totalDocsExamined", 0) / max(stats.get("nReturned", 0), 1)
    return Lookup(stages=tuple(stage["stage"] for stage in stages), index=index, examined=examined)


def _stages(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    inner = plan.get("queryPlan", plan)  # the newer engine keeps the readable plan one level down
    if "stage" in inner:
        yield inner
    for child in [inner.get("inputStage"), *inner.get("inputStages", [])]:
        if child:
            yield from _stages(child)


_WASTEFUL = 2.0  # documents looked at for one that matches


@final
@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What is known of a stream before it runs.

    Attributes:
        documents: How many one epoch has.
        counted: Whether they were counted; else it is the size of the collection, an upper bound.
        bytes: What an epoch sends over the wire, of the projected fields.
        index: The fields of the index that a range is read by; empty for a collection scan, None if unknown.
        examined: Documents that the server looks at for one that matches; None if unknown.
        documents_per_second: Of an epoch, by the slowest part; in `memory` and `download`, of loading.
        first_batch_s: Seconds to the first batch; measured when streaming, predicted where all is read first.
        buffer_bytes: Most memory for documents on their way to a batch, or for all of them in `memory`.
        bottleneck: The slowest part, in words.
        hints: What would help, most helpful first.
        step: Seconds of a training step by part, where they were measured: `data`, `transfer`, `forward`,
            `backward` and `optimizer`.
    """

    documents: int
    counted: bool
    bytes: int
    index: tuple[str, ...] | None
    examined: float | None
    documents_per_second: float
    first_batch_s: float
    buffer_bytes: int
    bottleneck: str
    hints: tuple[str, ...] = ()
    step: Mapping[str, float] | None = None

    @property
    def served(self) -> bool | None:
        """Whether an index serves the select: the server looks at little that does not match."""
        return None if self.examined is None else self.index != () and self.examined <= _WASTEFUL

    def rows(self) -> list[tuple[str, str]]:
        """Pairs of (what, how much) in words, for a table."""
        about = "" if self.counted else "at most "
        index = "unknown" if self.index is None else ", ".join(self.index) or "none: the collection is scanned"
        served = {None: "unknown", True: "yes", False: "no"}[self.served]
        looked = "" if self.examined is None else f" ({self.examined:.1f} documents looked at for each)"
        return [
            ("documents", f"{about}{self.documents:,}"),
            ("an epoch reads", f"{about}{self.bytes / 2**20:,.1f} MiB"),
            ("index", index),
            ("an index serves the select", served + looked),
            ("documents per second", f"{self.documents_per_second:,.0f}"),
            ("first batch after", f"{self.first_batch_s:.2f} s"),
            ("memory for documents", f"{self.buffer_bytes / 2**20:,.1f} MiB at most"),
            *((f"a step: {part}", f"{1000 * seconds:,.3f} ms") for part, seconds in (self.step or {}).items()),
            ("bottleneck", self.bottleneck),
            *(("hint", hint) for hint in self.hints),
        ]

    def __str__(self) -> str:
        width = max(len(what) for what, _ in self.rows())
        lines = ["What reading costs"]
        for what, how_much in self.rows():
            first, *more = textwrap.wrap(how_much, _WIDTH - width - 4) or [""]
            lines += [f"  {what.ljust(width)}  {first}", *(f"{'':{width + 4}}{line}" for line in more)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return html_pairs("What reading costs", self.rows())


def explain(
    database: Any,
    spec: StreamSpec,
    open_database: Callable[[], Any],
    *,
    step_seconds: float | None = None,
    probe_seconds: float = 0.5,
) -> Explanation:
    """Say what a stream will do.

    Args:
        database: An open pymongo (or mongomock) database.
        spec: What would be streamed.
        open_database: Opens the database in a worker.
        step_seconds: Seconds that one training step on one batch takes, where that is known.
        probe_seconds: How long to read for, and how long to count for, in seconds.

    Raises:
        EmptySelectError: The select matches no document.
        FieldMissingError: A document that was read lacks a field of the key.
        QueryError: The server refuses the query.
        ServerUnavailableError: The server cannot be read.
    """
    access = spec.open_access(lambda: database, database)
    windows = open_windows(access, spec)
    measured = probe(windows, spec, probe_seconds)
    mock = is_mock(database)
    documents, counted = count(database[spec.query.collection], spec.query, mock=mock, seconds=probe_seconds)
    asked = lookup(windows, access.reader())
    parts = _parts(spec, measured, step_seconds)
    rate, slowest = _rate(spec, parts)
    first = documents / rate if spec.mode != "stream" else _first_batch(database, spec, open_database)
    return Explanation(
        documents=documents,
        counted=counted,
        bytes=int(documents * measured.raw_bytes / max(measured.rows, 1)),
        index=None if asked is None else asked.index,
        examined=None if asked is None else asked.examined,
        documents_per_second=rate,
        first_batch_s=first,
        buffer_bytes=_buffer(spec, windows, measured, documents),
        bottleneck=slowest,
        hints=tuple(_hints(database, spec, measured, asked, mock=mock)),
    )


def _parts(spec: StreamSpec, measured: Probe, step_seconds: float | None) -> dict[str, float]:
    """Seconds a document, by part."""
    rows = max(measured.rows, 1)
    parts = {
        "the server: finding and sending documents": measured.read_s / rows,
        "decoding documents here": measured.decode_s / rows,
    }
    if spec.builds_samples:
        parts["building samples (transform, collate_fn)"] = measured.build_s / rows / max(spec.workers, 1)
    if step_seconds is not None and spec.mode == "stream":
        parts["the training step"] = step_seconds / spec.batch_size
    return parts


def _rate(spec: StreamSpec, parts: dict[str, float]) -> tuple[float, str]:
    """Documents a second, and the slowest part: parts overlap where something reads ahead."""
    overlap = spec.data_prefetch or spec.workers or spec.mode != "stream"
    seconds = max(parts.values()) if overlap else sum(parts.values())
    return 1 / max(seconds, 1e-9), max(parts, key=parts.__getitem__)


def _first_batch(database: Any, spec: StreamSpec, open_database: Callable[[], Any]) -> float:
    start = time.perf_counter()
    with Stream(open_database, spec, database=database) as stream:
        batches = iter(stream)
        next(batches, None)
        spent = time.perf_counter() - start
        batches.close()  # type: ignore[attr-defined]
    return spent


def _buffer(spec: StreamSpec, windows: WindowReader, measured: Probe, documents: int) -> int:
    rows = max(measured.rows, 1)
    memory, raw = measured.memory_bytes / rows, measured.raw_bytes / rows
    window = min(windows.rows * (windows.window if spec.shuffle else 1), documents)
    if spec.mode == "memory":
        return int(documents * memory)
    if spec.mode == "download":
        return int(window * memory)  # the rest is the system's page cache
    if not spec.data_prefetch:
        return int(window * memory * 2)
    ready = 0 if spec.shuffle else min(windows.rows * spec.prefetch_factor, spec.prefetch_bytes / max(memory, 1))
    in_flight = min(4 * windows.rows * raw, spec.in_flight_bytes)
    return int((window * 3 + min(ready, documents)) * memory + in_flight)


def _hints(database: Any, spec: StreamSpec, measured: Probe, asked: Lookup | None, *, mock: bool) -> Iterator[str]:
    if asked is not None and asked.examined > _WASTEFUL:
        fields = ", ".join(f'("{name}", 1)' for name in [*_filtered(spec.query.where), "_id"])
        yield (
            f"the server looks at {asked.examined:.0f} documents for one that matches: an index helps, "
            f"create_index([{fields}])"
        )
    if spec.mode == "stream" and not (spec.data_prefetch or spec.workers):
        yield "nothing reads ahead: data_prefetch=True lets reading and training overlap"
    for path, (kind, listed) in measured.kinds.items():
        if listed:
            yield (
                f"field {path!r} is a list of numbers: stored as a float32 tensor or BSON vector it is sent and "
                "decoded as 4 bytes a number, as a list it takes 11 or more"
            )
        elif kind == "object":
            yield f"field {path!r} is not numbers of one shape: it is decoded value by value"
    if spec.builds_samples and not spec.workers and measured.build_s > max(measured.read_s, measured.decode_s):
        yield "building samples takes longest: num_workers in loader_kwargs builds them in processes"
    if not mock and not _clustered(database, spec.query.collection):
        yield "ranges of _id are read through an index: a clustered collection (clusteredIndex on _id) saves that"


def _filtered(where: dict[str, Any]) -> list[str]:
    """The fields that a filter names, in order, those inside of `$and` too."""
    names: list[str] = []
    for name, value in where.items():
        if name == "$and":
            names += [inner for part in value for inner in _filtered(part)]
        elif not name.startswith("$") and name != "_id":
            names.append(name)
    return list(dict.fromkeys(names))


def _clustered(database: Any, name: str) -> bool:
    found: dict[str, Any] = next(iter(database.list_collections(filter={"name": name})), {})
    return "clusteredIndex" in found.get("options", {})
