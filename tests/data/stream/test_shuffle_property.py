import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mongotorch.data.decode.columns import build
from mongotorch.data.decode.ids import sort_key
from mongotorch.data.stream.batches import CachedRows, cut
from mongotorch.data.stream.position import HashMarkers, IdMarkers, Position
from mongotorch.data.stream.shuffle import Order

pytestmarker = pytest.mark.property

seeds = st.integers(min_value=-(2**70), max_value=2**70)


@given(
    seed=seeds,
    epoch=st.integers(0, 2**40),
    ranges=st.integers(1, 300),
    window=st.integers(1, 64),
    shuffle=st.booleans(),
)
def test_every_range_comes_exactly_once_and_any_window_can_be_the_first(
    seed: int, epoch: int, ranges: int, window: int, shuffle: bool
) -> None:
    order = Order(seed=seed, epoch=epoch, shuffle=shuffle, window=window)
    windows = [indices.tolist() for indices in order.windows(ranges)]
    assert sorted(index for indices in windows for index in indices) == list(range(ranges))
    start = seed % len(windows)
    assert [indices.tolist() for indices in order.windows(ranges, start)] == windows[start:]


@given(seed=seeds, keys=st.lists(st.integers(0, 2**64 - 1), max_size=50))
def test_rows_are_permuted_and_equal_keys_stay_in_order(seed: int, keys: list[int]) -> None:
    rows, ranks = Order(seed=seed, epoch=0, shuffle=True, window=1).rows(np.array(keys, dtype=np.uint64))
    assert ranks.tolist() == sorted(ranks.tolist())
    assert sorted(rows.tolist()) == list(range(len(keys)))
    for key in keys:
        positions = [row for row in rows.tolist() if keys[row] == key]
        assert positions == sorted(positions)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    batch_size=st.integers(1, 50),
    world=st.integers(1, 4),
    drop_last=st.booleans(),
    data=st.data(),
)
def test_shards_are_disjoint_with_equal_steps_and_resume_anywhere(
    sizes: list[int], batch_size: int, world: int, drop_last: bool, data: st.DataObject
) -> None:
    starts = np.cumsum([0, *sizes])

    def batches(rank: int, start: Position) -> list[tuple[list[int], Position]]:
        windows = (
            (n, CachedRows({}, np.arange(starts[n], starts[n + 1]))) for n in range(start.window, len(sizes))
        )
        return [
            ([int(starts[0]) + int(i) for rows, a, b in slices for i in rows.indices[a:b]], position)  # type: ignore[attr-defined]
            for slices, position in cut(
                windows, start, batch_size=batch_size, drop_last=drop_last, shard=(rank, world)
            )
        ]

    ranks = [batches(rank, Position()) for rank in range(world)]
    seen = [row for rank in ranks for rows, _ in rank for row in rows]
    assert len(seen) == len(set(seen))
    assert len({len(rank) for rank in ranks}) == 1
    left = sum(sizes) - len(seen)
    assert left < (batch_size * world if drop_last else world)
    stops = [n for n, (_, position) in enumerate(ranks[0]) if position.epoch == 0]
    if stops:
        stop = data.draw(st.sampled_from(stops))
        assert batches(0, ranks[0][stop][1]) == ranks[0][stop + 1 :]


@given(
    rows=st.dictionaries(st.integers(0, 2**64 - 1), st.integers(1, 3), min_size=1, max_size=40),
    data=st.data(),
)
def test_a_marker_finds_the_row_behind_it_whoever_comes_or_goes(rows: dict[int, int], data: st.DataObject) -> None:
    ranks = np.array([rank for rank in sorted(rows) for _ in range(rows[rank])], np.uint64)
    row = data.draw(st.integers(1, len(ranks)))
    marker = HashMarkers(ranks).before(row)
    assert marker is not None
    assert HashMarkers(ranks).behind(marker) == row
    last = int(ranks[row - 1])
    keep = {rank: data.draw(st.booleans()) for rank in rows if rank != last}
    keep[last] = data.draw(st.booleans()) if rows[last] == 1 else True
    now = np.array([rank for rank in ranks.tolist() if keep[rank]], np.uint64)
    behind = HashMarkers(now).behind(marker)
    assert now[behind:].tolist() == [rank for rank in ranks[row:].tolist() if keep[rank]]


@given(
    ids=st.lists(st.one_of(st.integers(-9, 9), st.text(max_size=3), st.none()), min_size=1, max_size=20),
    data=st.data(),
)
def test_a_marker_of_an_id_finds_what_sorts_behind_it(ids: list[Any], data: st.DataObject) -> None:
    ordered = [found for found, _ in itertools.groupby(sorted(ids, key=sort_key), key=sort_key)]
    values = [next(value for value in ids if sort_key(value) == key) for key in ordered]
    row = data.draw(st.integers(1, len(values)))
    marker = IdMarkers(build(values)).before(row)
    assert marker is not None
    left = [value for value in values if data.draw(st.booleans())]
    behind = IdMarkers(build(left)).behind(marker)
    assert left[behind:] == [value for value in values[row:] if value in left]


def test_markers_of_one_kind_mean_nothing_to_the_other() -> None:
    ranks, ids = HashMarkers(np.arange(5, dtype=np.uint64)), IdMarkers(build([1, 2, 3]))
    assert ranks.behind(str(ids.before(2))) is None
    assert ids.behind(str(ranks.before(2))) is None
    assert IdMarkers(build(["x" * 1000])).before(1) is None
    assert ids.before(0) is None


def test_a_marker_counts_only_where_its_document_comes_again() -> None:
    markers = [IdMarkers(build([1, 2, 2, 2, 300])).before(row) or "" for row in range(1, 6)]
    assert [marker.partition(".")[2] for marker in markers] == ["", "1", "2", "", ""]
