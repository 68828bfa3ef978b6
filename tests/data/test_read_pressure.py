"""How hard to read ahead: as hard as possible where somebody waits or there is room, else one thing at a time."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from mongotorch.data import prefetch as module
from mongotorch.data.prefetch import ReadPressure, ThreadPrefetcher, crowded, map_ordered


def test_with_room_it_is_always_high() -> None:
    demand = ReadPressure(crowded=False)
    demand.met()
    assert demand.high()


def test_in_a_crowd_it_is_high_only_while_somebody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=10.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    demand = ReadPressure(crowded=True)
    assert demand.high()  # nothing was given yet
    demand.met()
    assert not demand.high()
    demand.asked()
    assert not demand.high()  # what lies ready is taken at once
    clock.now += 0.1
    assert demand.high()


@pytest.mark.parametrize(
    ("nodes", "cores", "expected"),
    [
        ({("127.0.0.1", 27017)}, 2, True),
        ({("localhost", 1), ("::1", 2)}, 2, True),
        ({("/tmp/mongodb-27017.sock", None)}, 1, True),
        ({("127.0.0.1", 27017)}, 4, False),
        ({("db.example.org", 27017)}, 2, False),
        ({("localhost", 1), ("db.example.org", 27017)}, 2, False),
        (set(), 2, False),
    ],
)
def test_a_server_on_two_cores_of_this_machine_is_a_crowd(
    monkeypatch: pytest.MonkeyPatch, nodes: set[tuple[str, int]], cores: int, expected: bool
) -> None:
    monkeypatch.setattr(module, "cores", lambda: cores)
    assert crowded(SimpleNamespace(nodes=nodes)) is expected


def test_without_demand_items_are_done_here_and_in_order() -> None:
    high, where = [True], []

    def work(item: int) -> int:
        where.append(threading.current_thread() is threading.main_thread())
        return item

    results = map_ordered(
        work, iter(range(12)), threads=2, most=4, most_bytes=99, weigh=lambda _: 1, eager=lambda: high[0]
    )
    found = [next(results)]
    high[0] = False
    found += [next(results) for _ in range(8)]
    under_way = where.count(False)
    assert where[under_way:] == [True] * (len(where) - under_way)
    high[0] = True
    assert found + list(results) == list(range(12))
    assert not where[-1]


def test_nothing_overtakes_what_is_under_way_when_demand_changes_at_any_question() -> None:
    draw = random.Random(0)
    for _ in range(20):
        results = map_ordered(
            lambda item: item,
            iter(range(60)),
            threads=2,
            most=4,
            most_bytes=99,
            weigh=lambda _: 1,
            eager=lambda: draw.random() < 0.5,
        )
        assert list(results) == list(range(60))


def test_who_waits_for_an_item_says_so() -> None:
    demand, go = ReadPressure(crowded=True), threading.Event()

    def items() -> Iterator[int]:
        for item in range(3):
            assert go.wait(5)
            yield item

    ahead = ThreadPrefetcher(items(), most=2, most_bytes=9, weigh=lambda _: 1, demand=demand)
    seen = []

    def watch() -> None:
        end = time.monotonic() + 4
        while not demand.high() and time.monotonic() < end:
            time.sleep(0.001)
        seen.append(demand.high())
        go.set()

    demand.met()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    assert list(ahead) == [0, 1, 2]
    thread.join(5)
    assert seen == [True]
    ahead.close()
