"""Memory for the tensors of a window."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from mongotorch.data.stream.batches import fresh


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
