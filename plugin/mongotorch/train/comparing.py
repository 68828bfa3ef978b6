"""Whether two results of training are the same, bit for bit, and where they are not.

Always: what is compared is the memory of the tensors, so that 0.0 and -0.0 differ and a NaN equals itself; dtypes
and shapes count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def differing(first: Any, second: Any, where: str = "") -> Iterator[str]:
    """The names of what is not the same in two modules, states, or structures of tensors and plain values.

    Args:
        first: One of them.
        second: The other.
        where: The name of the whole.
    """
    if isinstance(first, nn.Module) and isinstance(second, nn.Module):
        first, second = first.state_dict(), second.state_dict()
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if not _same_bits(first, second):
            yield where
    elif isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in dict.fromkeys([*first, *second]):
            name = f"{where}.{key}" if where else str(key)
            if key in first and key in second:
                yield from differing(first[key], second[key], name)
            else:
                yield name
    elif isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        for at, (one, other) in enumerate(zip(first, second, strict=True)):
            yield from differing(one, other, f"{where}[{at}]")
    elif type(first) is not type(second) or first != second:
        yield where


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    one, other = (part.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for part in (first, second))
    return torch.equal(one, other)
