"""A run over 10^9 documents on 64 ranks, of a collection that is only simulated."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from tests.data.stream.simulated import BILLION, Collection, Simulated

from mongotorch.data import Stream
from mongotorch.data.read import Plan
from mongotorch.data.stream.shuffle import Order, WindowSpec
from mongotorch.data.stream.windows import PlannedWindows, Window

RANKS = 64
BOUND = 256 * 2**20  # what `prefetch_bytes` is unless given


def test_plan_first_step_and_resumed_step_are_cheap() -> None:
    command = [sys.executable, "-m", "tests.data.stream.simulated", str(BILLION), str(RANKS)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    for found in map(json.loads, ran.stdout.splitlines()):
        assert 0.9 < found["ranges"] * found["rows"] / BILLION < 1.3  # bounds are sampled
        assert found["first"]["seconds"] < 1.0
        assert found["resumed"]["seconds"] < 1.0
        assert max(found[name]["mib"] for name in ("plan", "order", "first", "resumed")) < 200


@pytest.mark.parametrize("documents", [10_000_000, 200_000_000, BILLION])
@pytest.mark.parametrize("row_bytes", [30.0, 400.0, 3300.0])
def test_windows_keep_their_bound_where_ranges_are_large(documents: int, row_bytes: float) -> None:
    plan = Collection(Simulated(documents=documents, row_bytes=row_bytes)).plan()
    assert plan.rows * plan.window * row_bytes <= BOUND / 2
    assert plan.rows == max(1000, documents // 50_000)
    assert 0.9 < plan.rows * len(plan) / documents < 1.3


def test_ranges_as_large_as_ever_have_the_windows_they_had() -> None:
    plan = Collection(Simulated(documents=50_000_000)).plan()
    assert (plan.rows, plan.window) == (1000, 50)


class Shared:
    """The windows that are being read, once for all ranks of this process."""

    def __init__(self) -> None:
        self._known: dict[Any, Window] = {}
        self._read = PlannedWindows.read

    def read(self, reader: PlannedWindows, specs: Iterator[WindowSpec], **_: Any) -> Iterator[Window]:
        for spec in specs:
            key = spec.order, spec.number
            if key not in self._known:
                self._known = dict(list(self._known.items())[-1:])
                self._known[key] = next(self._read(reader, iter([spec]), prefetch=False))
            yield self._known[key]


def numbers_of(plan: Plan, simulated: Simulated, ranges: list[int]) -> np.ndarray[Any, Any]:
    """The documents of some ranges."""
    bounds = [plan.bounds(one) for one in ranges]
    ends = [(simulated.number(b.lower), simulated.number(b.upper) + b.closed) for b in bounds]
    return np.concatenate([np.arange(*end) for end in ends])


def step(parts: tuple[Any, ...]) -> list[torch.Tensor]:
    """The documents of one step, of all ranks."""
    return [batch for part in parts for batch in part.batches if batch is not None]


@pytest.mark.parametrize(("is_object_id", "share"), [(True, 0.01), (False, 0.001)])
def test_each_document_comes_once_over_all_ranks(
    is_object_id: bool, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated = Simulated(is_object_id=is_object_id)
    collection, shared = Collection(simulated), Shared()
    monkeypatch.setattr(PlannedWindows, "read", lambda reader, specs, **given: shared.read(reader, specs, **given))
    plan = collection.plan()
    order = list(Order(seed=0, epoch=0, shuffle=True, window=plan.window).windows(len(plan)))
    assert sorted(np.concatenate(order)) == list(range(len(plan)))
    asked, looked_at, draw = BILLION * share, 0, random.Random(1)
    with collection.opened(), ExitStack() as opened:
        streams: list[Stream] = [opened.enter_context(collection.stream(n, RANKS)) for n in range(RANKS)]
        state = streams[0].state_dict()
        while looked_at < asked:
            window = draw.randrange(2, len(order) - 3)
            for one in streams:
                one.load_state_dict({**state, "source": plan.digest, "window": window, "offset": 0})
            found: list[torch.Tensor] = []
            for parts in zip(*streams, strict=True):
                assert len({part.position for part in parts}) == 1
                found += step(parts)
                if streams[0].state_dict()["window"] > window + 1:
                    break
            rows = torch.cat(found).numpy()
            expected = numbers_of(plan, simulated, np.concatenate(order[window : window + 2]).tolist())
            following = numbers_of(plan, simulated, order[window + 2].tolist())
            assert len(np.unique(rows)) == len(rows)
            assert not len(np.setdiff1d(expected, rows, assume_unique=True))
            assert not len(np.setdiff1d(rows, np.concatenate([expected, following]), assume_unique=True))
            looked_at += len(expected)
