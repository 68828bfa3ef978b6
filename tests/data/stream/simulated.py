"""A collection of any number of documents that is in no database: each reply is made of the bounds that it is for.

`_id`s are numbers or ObjectIds that ascend without a gap, and the field `n` counts the documents from 0.

    python -m tests.data.stream.simulated [DOCUMENTS] [RANKS]

prints what a plan, the first step, a resumed step and the order of an epoch cost.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import mongomock
import numpy as np
from bson import ObjectId, Timestamp

from mongotorch.data import Stream, StreamSpec
from mongotorch.data.decode import Reply
from mongotorch.data.read import Plan, make_plan
from mongotorch.data.read import reader as reading
from mongotorch.data.read.reader import IdRange, Reader
from mongotorch.data.stream.shuffle import Order
from mongotorch.mongo.driver_errors import RetryPolicy
from mongotorch.query import Query

BILLION: Final = 10**9
ROWS: Final = 256
"""Rows of a step on each rank."""
_QUERY: Final = Query.find("rows")
_FIRST = int.from_bytes(b"\x60" + bytes(11), "big")
_HEAD = [("size", "<i4"), ("type", "u1"), ("name", "S4")]
_TAIL = [("ntype", "u1"), ("nname", "S2"), ("n", "<i8"), ("end", "u1")]


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What is simulated.

    Attributes:
        documents: How many there are.
        is_object_id: Whether `_id`s are ObjectIds, else numbers.
        row_bytes: How large documents are said to be; they are small ones.
    """

    documents: int = BILLION
    is_object_id: bool = False
    row_bytes: float = 30.0

    def made_id(self, number: int) -> Any:
        """The `_id` of a document."""
        return ObjectId((_FIRST + number).to_bytes(12, "big")) if self.is_object_id else number

    def number(self, document_id: Any) -> int:
        """The number of a document."""
        return int.from_bytes(document_id.binary, "big") - _FIRST if self.is_object_id else document_id

    def reply(self, first: int, stop: int) -> Reply:
        """Documents, as BSON."""
        form = ("id", "V12") if self.is_object_id else ("id", "<i8")
        found = np.zeros(stop - first, np.dtype([*_HEAD, form, *_TAIL]))
        numbers = np.arange(first, stop, dtype=np.int64)
        found["size"], found["name"], found["nname"] = found.dtype.itemsize, b"_id", b"n"
        found["type"], found["ntype"], found["n"] = 0x07 if self.is_object_id else 0x12, 0x12, numbers
        if self.is_object_id:
            octets = np.zeros((len(found), 12), np.uint8)
            octets[:, 0], octets[:, 4:] = 0x60, numbers.astype(">u8").view(np.uint8).reshape(-1, 8)
            found["id"] = octets.view("V12")[:, 0]
        else:
            found["id"] = numbers
        return found.tobytes()


class SimulatedReader(Reader):
    """Reads a simulated collection."""

    threads = 2

    def __init__(self, simulated: Simulated, *given: Any) -> None:
        super().__init__(*given)
        self.simulated = simulated

    def _bounds(self, bounds: IdRange) -> tuple[int, int]:
        lower, upper = map(self.simulated.number, (bounds.lower, bounds.upper))
        return lower, upper + bounds.closed

    def ends(self) -> tuple[Any, Any]:
        return self.simulated.made_id(0), self.simulated.made_id(self.simulated.documents - 1)

    def walk(self, bounds: IdRange, step: int) -> Iterator[Any]:
        lower, upper = self._bounds(bounds)
        yield from map(self.simulated.made_id, range(lower + step, upper, step))

    def head(self, count: int, *, last: bool = False) -> list[Reply]:
        size = self.simulated.documents
        return [self.simulated.reply(size - count, size) if last else self.simulated.reply(0, count)]

    def read(
        self, bounds: IdRange, expected: int, ids: list[Any] | None = None, *, at: Timestamp | None = None
    ) -> list[Reply]:
        assert ids is None
        assert at is None
        return [self.simulated.reply(*self._bounds(bounds))]

    def drain(self, skip: int, rows: int) -> Iterator[Reply]:
        raise NotImplementedError

    def size(self) -> int:
        return self.simulated.documents

    def count(self, bounds: IdRange | None, *, at: Timestamp | None = None) -> int:
        assert at is None
        return self.simulated.documents

    def probe(self, count: int) -> tuple[list[Any] | None, float]:
        return None, self.simulated.row_bytes

    def record_numbers(self, ids: list[Any]) -> list[int]:
        return [self.simulated.number(one) + 1 for one in ids]

    def sample(self, count: int, bounds: IdRange) -> list[Any]:
        draw = random.Random(count)
        numbers = sorted(draw.randrange(1, self.simulated.documents - 1) for _ in range(count))
        return [self.simulated.made_id(number) for number in numbers]


class Collection:
    """A simulated collection, and a database that keeps plans of it.

    Args:
        simulated: What is simulated.
    """

    def __init__(self, simulated: Simulated) -> None:
        self.simulated = simulated
        self.database: Any = mongomock.MongoClient()["simulated"]

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Let all that is read inside be this collection."""

        def reader(database: Any, query: Query, projection: Mapping[str, Any], retry: RetryPolicy) -> Reader:
            return SimulatedReader(self.simulated, database, query, projection, retry)

        with patch.object(reading, "open_reader", reader):
            yield

    def plan(self) -> Plan:
        """The plan that all ranks have."""
        reader = SimulatedReader(self.simulated, self.database, _QUERY, {"n": 1}, RetryPolicy(deadline_s=1.0))
        return make_plan(self.database, reader, self.spec(0, 1).sizes)

    def spec(self, rank: int, ranks: int, **given: Any) -> StreamSpec:
        """What one of many ranks streams."""
        usual = {"query": _QUERY, "key": "n", "batch_size": ROWS * ranks, "lanes": ranks, "shuffle": True}
        return StreamSpec(**{**usual, "shard": (rank, ranks), **given})

    def stream(self, rank: int, ranks: int, **given: Any) -> Stream:
        """What one of many ranks reads."""
        return Stream(lambda: self.database, self.spec(rank, ranks, **given), database=self.database)


@dataclass(kw_only=True)
class Cost:
    """What something has cost in this process.

    Attributes:
        seconds: Of the processor.
        mib: By how much the process has grown at most since it began.
    """

    seconds: float = 0.0
    mib: float = 0.0


def _peak_mib() -> float:
    """The most memory that this process has had; what `getrusage` says may be that of the process it is from."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


_BEGUN = _peak_mib()


@contextmanager
def measured() -> Iterator[Cost]:
    """What is done inside costs."""
    cost, began = Cost(), time.process_time()
    yield cost
    cost.seconds = time.process_time() - began
    cost.mib = _peak_mib() - _BEGUN


def costs(documents: int, ranks: int, *, is_object_id: bool, row_bytes: float = 30.0) -> dict[str, Any]:
    """What one of many ranks does before its first step, and before a step that it goes on with."""
    found: dict[str, Any] = {}
    collection = Collection(Simulated(documents=documents, is_object_id=is_object_id, row_bytes=row_bytes))
    with collection.opened():
        with measured() as found["plan"]:
            plan = collection.plan()
        found["ranges"], found["rows"], found["window"] = len(plan), plan.rows, plan.window
        with measured() as found["order"]:
            order = Order(seed=1, epoch=0, shuffle=True, window=plan.window)
            found["windows"] = sum(1 for _ in order.windows(len(plan)))
        draw, first, resumed = random.Random(documents), list[Cost](), list[Cost]()
        for rank in (0, ranks // 2, ranks - 1):
            with collection.stream(rank, ranks) as stream, measured() as cost:
                next(iter(stream))
                state = stream.state_dict()
            first.append(cost)
            window = draw.randrange(2, found["windows"])
            with collection.stream(rank, ranks) as stream, measured() as cost:
                stream.load_state_dict({**state, "window": window, "offset": plan.rows // 3, "after": None})
                next(iter(stream))
            resumed.append(cost)
    for name, several in (("first", first), ("resumed", resumed)):  # the least is what it is on an idle machine
        found[name] = Cost(seconds=min(one.seconds for one in several), mib=max(one.mib for one in several))
    return {name: asdict(value) if isinstance(value, Cost) else value for name, value in found.items()}


if __name__ == "__main__":
    asked = [int(float(one)) for one in sys.argv[1:]]
    for is_object_id in (False, True):
        for size in (30.0, 1000.0):
            given = (asked + [BILLION, 64][len(asked) :])[:2]
            print(json.dumps(costs(*given, is_object_id=is_object_id, row_bytes=size)))
