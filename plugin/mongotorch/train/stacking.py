"""From the items that `predict` gets to one batch, and from the output back to one result an item.

Always: the rule of dtypes is that of training: plain floats become torch's default dtype, integers int64,
booleans bool; arrays and tensors keep theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mongotorch.errors import ShapeError


def stack(items: Sequence[Any]) -> Any:
    """The batch of items: a tensor of shape (n, ...), or a tuple or dict of them.

    Raises:
        ShapeError: Items of different shape, or that have no tensor.
    """
    first = items[0]
    if isinstance(first, tuple):
        return tuple(stack(part) for part in zip(*items, strict=True))
    if isinstance(first, Mapping):
        return {name: stack([item[name] for item in items]) for name in first}
    try:
        return torch.stack([_tensor(item) for item in items])
    except (RuntimeError, TypeError, ValueError) as error:
        raise ShapeError(
            f"the items cannot be stacked into a batch ({error}); let preprocess return tensors of one shape"
        ) from error


def unstack(output: Any, count: int) -> list[Any]:
    """The output of each item, without the batch dimension."""
    if isinstance(output, Tensor):
        if output.ndim and len(output) == count:
            return list(output.unbind())
        raise ShapeError(
            f"the output has shape {tuple(output.shape)} for {count} items; its first dimension must be the batch"
        )
    if isinstance(output, Mapping):
        parts = {name: unstack(part, count) for name, part in output.items()}
        return [{name: part[n] for name, part in parts.items()} for n in range(count)]
    if isinstance(output, list | tuple):
        columns = [unstack(part, count) for part in output]
        return [tuple(column[n] for column in columns) for n in range(count)]
    return [output] * count


def rows_of(batch: Any) -> int:
    """How many samples a batch has: the first dimension of its first tensor, 1 without one."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        return next((n for n in map(rows_of, batch) if n != 1), 1)
    return 1


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.as_tensor(np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value)
