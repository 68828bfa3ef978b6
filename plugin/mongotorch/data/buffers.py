"""Memory for the tensors of a window: whole mappings of their own, given back as soon as nobody looks at them.

`malloc` learns from each large block that is freed: after the first window it keeps blocks of that size in its
heaps, where they fall to pieces between smaller ones, and the process grows with every few windows. It also hands
them out in pages of 4 KB, each of which the kernel has to fault in while rows are scattered over them.

Always: a buffer is fresh, writable, and freed with its last tensor.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_LEAST = 2**20  # bytes; less than that is well kept by malloc


def fresh(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor whose values are not set yet."""
    size = math.prod(shape) * dtype.itemsize
    if size < _LEAST or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(tuple(shape), dtype=dtype)
    mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapped, dtype=dtype).view(tuple(shape))
