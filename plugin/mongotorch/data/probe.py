"""Short measurements of a select: what the server answers, how fast, and what becomes of it here.

Always: a probe reads a few ranges and ends after its time; it changes nothing but the stored plan, which the
stream would store as well.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

from pymongo.errors import OperationFailure, PyMongoError

from mongotorch.data.columns import Columns
from mongotorch.data.memory import gathered
from mongotorch.data.order import Order
from mongotorch.data.replies import find_command
from mongotorch.data.rows import batch_of
from mongotorch.data.samples import SampleBuilder
from mongotorch.data.serverreader import ServerReader
from mongotorch.data.source import PlannedSource, Source
from mongotorch.data.spec import StreamSpec
from mongotorch.query import Query

_TOO_LONG = 50  # the server's error code for a question that took longer than it may


@final
@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a few blocks told.

    Attributes:
        rows: Documents read.
        raw_bytes: Their BSON, as projected.
        held_bytes: What they are in memory.
        read_s: Seconds until the server had given them.
        decode_s: Seconds until they were tensors.
        build_s: Seconds that building samples took; 0 where none are built.
        kinds: The kind of each column: `number`, `array`, `object` and the like, and whether it is of lists.
    """

    rows: int
    raw_bytes: int
    held_bytes: int
    read_s: float
    decode_s: float
    build_s: float
    kinds: Mapping[str, tuple[str, bool]]


def probe(source: Source, spec: StreamSpec, seconds: float) -> Probe:
    """Read blocks, in the order of an epoch, for about so many seconds, two at least where there are two."""
    order = Order(seed=spec.seed, epoch=0, shuffle=spec.shuffle, window=source.window)
    rows = raw_bytes = held = 0
    read = decoded = built = 0.0
    kinds: Mapping[str, tuple[str, bool]] = {}
    raws = source.raws(_indices(source, order))
    start = time.perf_counter()
    for raw in itertools.islice(raws, 1000):
        arrived = time.perf_counter()
        block = source.decode(raw)
        done = time.perf_counter()
        if len(block):
            kinds = {path: _kind(block, path) for path in block.paths}
            _batch(block, spec)
            built += time.perf_counter() - done if spec.builds_samples else 0.0
        now = time.perf_counter()
        rows, raw_bytes, held = rows + len(block), raw_bytes + sum(map(len, raw)), held + block.nbytes
        read, decoded = read + arrived - start, decoded + done - arrived
        if read + decoded + built > seconds:
            break
        start = now
    close = getattr(raws, "close", None)
    if close is not None:
        close()
    return Probe(
        rows=rows, raw_bytes=raw_bytes, held_bytes=held, read_s=read, decode_s=decoded, build_s=built, kinds=kinds
    )


def _indices(source: Source, order: Order) -> Iterator[int]:
    if source.count is None:
        return itertools.count()
    return (int(index) for window in order.windows(source.count) for index in window)


def _kind(block: Columns, path: str) -> tuple[str, bool]:
    column = block[path]
    return column.kind, column.kind == "number" and getattr(column.data, "ndim", 1) > 1


def _batch(block: Columns, spec: StreamSpec) -> Any:
    """What the stream makes of a block; it raises what the stream would raise."""
    if spec.builds_samples:
        return SampleBuilder(
            key=spec.key, transform=spec.transform, signature=spec.signature, collate_fn=spec.collate_fn
        )(block)
    rows = gathered([block], None)
    return batch_of([(rows, 0, len(rows))], spec.key)


def count(collection: Any, query: Query, *, mock: bool, seconds: float) -> tuple[int, bool]:
    """How many documents match, and whether that was counted rather than estimated.

    Counting a filter without an index is a scan: it is given up after so many seconds, and what is left is the
    number of documents of the whole collection.
    """
    limits = {} if mock else {"maxTimeMS": max(int(seconds * 1000), 1)}
    try:
        if query.is_pipeline:
            stages = [*(query.stages or []), {"$count": "n"}]
            return next((int(found["n"]) for found in collection.aggregate(stages, **limits)), 0), True
        if not query.where:
            found = int(collection.estimated_document_count())
        else:
            found = int(collection.count_documents(query.where, **limits))
    except OperationFailure as error:
        if error.code != _TOO_LONG:
            raise
        return int(collection.estimated_document_count()), False
    found = max(found - query.skipped, 0)
    return found if query.limited is None else min(found, query.limited), True


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


def lookup(source: Source, reader: Any) -> Lookup | None:
    """Ask the server how it reads one range of the plan; None where it cannot be asked."""
    if not isinstance(source, PlannedSource) or not isinstance(reader, ServerReader):
        return None
    where, options = reader.bounded(source.plan.span(len(source.plan) // 2))
    command = find_command(reader.collection, where, reader.projection, 101, **options)
    command.pop("readConcern", None)
    try:
        answer = reader.collection.database.command("explain", command, verbosity="executionStats")
    except PyMongoError:  # a user who may read but not explain
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
