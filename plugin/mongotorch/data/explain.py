"""What a stream will do, told before it does it: how much, how fast, by which index, and what holds it up.

Always: numbers come from asking this server and reading a few ranges now, not from a table; what cannot be known
(mongomock has no plans) is None and not a guess; nothing of the user's data is changed. The plan of ranges that
the stream will use is found, and stored as the stream itself would.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

from mongotorch.data.access import Access
from mongotorch.data.dataset import Stream
from mongotorch.data.demand import crowded
from mongotorch.data.mockreader import MockReader
from mongotorch.data.probe import Lookup, Probe, count, lookup, probe
from mongotorch.data.source import PlannedSource, Source, open_source
from mongotorch.data.spec import StreamSpec

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
            ("bottleneck", self.bottleneck),
            *(("hint", hint) for hint in self.hints),
        ]


def explain(
    database: Any,
    spec: StreamSpec,
    open_database: Callable[[], Any],
    *,
    step_seconds: float | None = None,
    probe_seconds: float = 0.5,
) -> Explanation:
    """Tell what a stream will do.

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
    opened = Access(lambda: database, database, spec)
    source = open_source(
        opened.reader, opened.database, spec.query, spec.key.paths, spec.sizes, shuffle=spec.shuffle
    )
    reader = opened.reader()
    measured = probe(source, spec, probe_seconds)
    mock = isinstance(reader, MockReader)
    documents, counted = count(database[spec.query.collection], spec.query, mock=mock, seconds=probe_seconds)
    asked = lookup(source, reader)
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
        buffer_bytes=_buffer(spec, source, measured, documents),
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


def _buffer(spec: StreamSpec, source: Source, measured: Probe, documents: int) -> int:
    rows = max(measured.rows, 1)
    held, raw = measured.held_bytes / rows, measured.raw_bytes / rows
    block = source.plan.rows if isinstance(source, PlannedSource) else spec.prefetch_size
    window = min(block * (source.window if spec.shuffle else 1), documents)
    if spec.mode == "memory":
        return int(documents * held)
    if spec.mode == "download":
        return int(window * held)  # the rest is the system's page cache
    if not spec.data_prefetch:
        return int(window * held * 2)
    ready = 0 if spec.shuffle else min(block * spec.prefetch_factor, spec.prefetch_bytes / max(held, 1))
    under_way = min(4 * block * raw, spec.prefetch_bytes / 8)
    return int((window * 3 + min(ready, documents)) * held + under_way)


def _hints(database: Any, spec: StreamSpec, measured: Probe, asked: Lookup | None, *, mock: bool) -> Iterator[str]:
    if asked is not None and asked.examined > _WASTEFUL:
        fields = ", ".join(f'("{name}", 1)' for name in [*_filtered(spec.query.where), "_id"])
        yield (
            f"the server looks at {asked.examined:.0f} documents for one that matches: an index helps, "
            f"create_index([{fields}])"
        )
    if spec.mode == "stream" and not (spec.data_prefetch or spec.workers):
        yield "nothing reads ahead: data_prefetch=True lets reading and training overlap"
    elif spec.mode == "stream" and not (spec.workers or spec.builds_samples or mock) and crowded(database.client):
        yield (
            "the server, reading and training share two cores: num_workers=1 with persistent_workers=True in "
            "loader_kwargs reads in a process of its own, which holds the training up less than a thread does"
        )
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
