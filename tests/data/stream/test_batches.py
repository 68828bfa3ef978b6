"""The tensors of a window: their memory, and how they are put together."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import bson
import numpy as np
import pytest
import torch

from mongotorch.data.decode import Column, decode
from mongotorch.data.stream.batches import fresh, gathered


@pytest.mark.parametrize("shape", [(0, 3), (5,), (7, 2, 3), (2**18, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool, torch.bfloat16])
def test_a_buffer_has_its_shape_and_can_be_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = fresh(shape, dtype)
    assert (tuple(made.shape), made.dtype) == (shape, dtype)
    made.fill_(1)
    assert bool((made == 1).all())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux for the mappings")
def test_a_large_buffer_lives_as_long_as_a_view_of_it_and_no_longer() -> None:
    size = 37 * 2**20

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096

    gc.collect()
    before = resident()
    view = fresh((size,), torch.uint8).fill_(3)[10:20]
    assert view.tolist() == [3] * 10
    held = resident()
    assert held - before > size * 0.9
    del view
    assert held - resident() > size * 0.9


FIELDS = [f"f{number}" for number in range(40)]


def documents(first: int, count: int) -> bytes:
    """Documents of 40 numbers, a text, and a list whose length differs."""
    made = [
        {"_id": n, **{name: float(n) for name in FIELDS}, "text": f"number {n}", "list": list(range(n % 5))}
        for n in range(first, first + count)
    ]
    return b"".join(map(bson.encode, made))


def test_the_fields_of_a_window_are_looked_at_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [decode(documents(0, 30), FIELDS), decode(documents(30, 20), FIELDS)]
    sliced: list[Column] = []
    original = Column.slice

    def counted(column: Column, *args: Any, **options: Any) -> Column:
        sliced.append(column)
        return original(column, *args, **options)

    monkeypatch.setattr(Column, "slice", counted)
    rows = gathered(parts, np.arange(50)[::-1].copy())
    assert len(sliced) <= len(FIELDS) + 1  # and the `_id`
    assert all(rows.tensor(name, 0, 2).tolist() == [49.0, 48.0] for name in FIELDS)  # type: ignore[union-attr]
