"""Tensors in user documents: written as stored arrays, read back as tensors.

Always: a tensor comes back with its dtype and shape, on the CPU and without gradient; a numpy array that is
written comes back as a tensor too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mongotorch.codecs import ArrayParts
from mongotorch.codecs import decode_document as _decode
from mongotorch.codecs import encode_document as _encode


def encode_document(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document with its tensors and arrays as BSON.

    Raises:
        CodecError: A value that BSON cannot hold; `field` names it.
    """
    return _encode(document, as_array=tensor_parts)


def decode_document(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document with its stored arrays as tensors."""
    return _decode(document, from_array=parts_tensor)


def tensor_parts(value: Any) -> ArrayParts | None:
    """What is stored of a tensor; None for anything else."""
    if not isinstance(value, Tensor):
        return None
    flat = value.detach().to("cpu").contiguous().resolve_conj().resolve_neg().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return ArrayParts(dtype=str(value.dtype).removeprefix("torch."), shape=tuple(value.shape), data=data)


def parts_tensor(parts: ArrayParts) -> Any:
    """The tensor of a stored array; a numpy array where torch has no such dtype."""
    dtype = getattr(torch, parts.dtype, None)
    if not isinstance(dtype, torch.dtype):
        return np.frombuffer(parts.data, np.dtype(parts.dtype)).reshape(parts.shape).copy()
    if not len(parts.data):
        return torch.empty(parts.shape, dtype=dtype)
    return torch.frombuffer(bytearray(parts.data), dtype=dtype).reshape(parts.shape)
