"""Which BSON values are stored arrays, and the numpy arrays they stand for.

Always: what is not exactly a stored array (another key, a wrong byte count, an unknown dtype) stays the plain
value that `bson.decode` gave. The same rules as the codec of documents, kept here in a form without blobs.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
from bson.binary import VECTOR_SUBTYPE, Binary
from numpy.typing import NDArray

BFLOAT16 = "bfloat16"
VECTOR_DTYPES: dict[int, np.dtype[Any]] = {0x27: np.dtype("<f4"), 0x03: np.dtype("i1")}
_NUMERIC_KINDS = "biufc"
_HOLDERS = frozenset({Binary, dict, list})


class BFloat16(np.ndarray[Any, np.dtype[np.uint16]]):
    """Bit patterns of bfloat16 numbers, which numpy has no dtype for, as uint16."""


def dtype_name(array: NDArray[Any]) -> str:
    """The numpy name of the element type, or `bfloat16`."""
    return BFLOAT16 if isinstance(array, BFloat16) else array.dtype.name


def restore(value: Any) -> Any:
    """A decoded BSON value with every stored array in it, at any depth, turned into a numpy array."""
    if type(value) is Binary and value.subtype == VECTOR_SUBTYPE:
        return _vector(value)
    if type(value) is list:
        return value if _HOLDERS.isdisjoint(map(type, value)) else [restore(item) for item in value]
    if type(value) is not dict:
        return value
    array = from_parts(value)
    return {key: restore(item) for key, item in value.items()} if array is None else array


def from_parts(value: dict[str, Any]) -> NDArray[Any] | None:
    """The array of a `{dtype, shape, data}` sub-document; None if it is something else."""
    if value.keys() != {"dtype", "shape", "data"}:
        return None
    dtype, shape, data = element_type(value["dtype"]), value["shape"], value["data"]
    if dtype is None or type(shape) is not list or not isinstance(data, bytes):
        return None
    if not all(isinstance(size, int) and type(size) is not bool and size >= 0 for size in shape):
        return None
    if math.prod(shape) * dtype.itemsize != len(data):
        return None
    try:
        array = np.frombuffer(data, dtype).reshape(shape).copy()
    except (ValueError, OverflowError):
        return None  # more dimensions, or larger ones, than numpy has
    return array.view(BFloat16) if value["dtype"] == BFLOAT16 else array


def element_type(name: object) -> np.dtype[Any] | None:
    """The little-endian numpy dtype of a stored dtype name; None if it names no numeric type."""
    if name == BFLOAT16:
        return np.dtype("<u2")
    try:
        dtype = np.dtype(name) if isinstance(name, str) else None
    except (TypeError, ValueError, SyntaxError):
        return None
    if dtype is None or dtype.kind not in _NUMERIC_KINDS:
        return None
    return dtype.newbyteorder("<")


def vector_type(header: bytes, size: int) -> np.dtype[Any] | None:
    """The element type of a vector with this two-byte header and so many bytes after it, if it is one."""
    if len(header) != 2:
        return None
    code, padding = struct.unpack("<BB", header)
    dtype = VECTOR_DTYPES.get(code)
    return dtype if dtype is not None and not padding and not size % dtype.itemsize else None


def _vector(value: Binary) -> Any:
    dtype = vector_type(bytes(value[:2]), len(value) - 2)
    return value if dtype is None else np.frombuffer(value, dtype, offset=2).copy()
