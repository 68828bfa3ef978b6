"""Arrays in user documents, as plain BSON that any client can read.

Always: a 1-D float32 or int8 array is a BSON vector (binary subtype 9); any other array is the sub-document
`{"dtype", "shape", "data"}`, little-endian in C order; dtype and shape come back exactly. A sub-document that
only looks alike (another key, bytes that do not fit) stays what it is. Vectors: BSON specification, subtype 9.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from bson.binary import Binary, BinaryVectorDtype

from mongotorch.errors import CodecError

_VECTOR_HEADERS = {"float32": b"\x27\x00", "int8": b"\x03\x00"}
_VECTOR_DTYPES = {header: dtype for dtype, header in _VECTOR_HEADERS.items()}
_VECTOR_SUBTYPE = 9
_ARRAY_KEYS = {"dtype", "shape", "data"}

assert BinaryVectorDtype.FLOAT32.value == _VECTOR_HEADERS["float32"][:1]  # noqa: S101 - the specification


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayParts:
    """An array without a library: `data` is little-endian, C order; `dtype` is numpy's name, or `bfloat16`."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


AsArray = Callable[[Any], ArrayParts | None]
FromArray = Callable[[ArrayParts], Any]


def numpy_parts(value: Any) -> ArrayParts | None:
    """The parts of a numpy array; None for anything else. Raises: CodecError for arrays of objects or text."""
    if not isinstance(value, np.ndarray):
        return None
    if isinstance(value, np.ma.MaskedArray):
        raise CodecError("a masked array would lose its mask; store its data and its mask as two fields")
    if value.dtype.kind not in "biufc":
        raise CodecError(f"an array of dtype {value.dtype} cannot be stored; use numbers or booleans, or a list")
    little = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
    return ArrayParts(dtype=value.dtype.name, shape=value.shape, data=little.tobytes())


def numpy_array(parts: ArrayParts) -> Any:
    """A writable numpy array. Raises: CodecError for bfloat16, which numpy does not have."""
    if parts.dtype == "bfloat16":
        raise CodecError("numpy has no bfloat16; read this document as tensors")
    dtype = np.dtype(parts.dtype).newbyteorder("<")
    return np.frombuffer(parts.data, dtype).reshape(parts.shape).astype(np.dtype(parts.dtype))


def encode_document(
    document: Mapping[str, Any], as_array: AsArray | None = None, *, where: str = ""
) -> dict[str, Any]:
    """A document with its arrays as BSON.

    Args:
        document: What a user inserts.
        as_array: Takes arrays of another library apart, None for what is none; numpy is always known.
        where: The path so far, for errors.

    Raises:
        CodecError: An array that cannot be stored; `field` is its path.
    """
    return {
        key: _encode(value, as_array, f"{where}.{key}" if where else str(key)) for key, value in document.items()
    }


def decode_document(document: Mapping[str, Any], from_array: FromArray = numpy_array) -> dict[str, Any]:
    """A document with its arrays made by `from_array`."""
    return {key: _decode(value, from_array) for key, value in document.items()}


def _encode(value: Any, as_array: AsArray | None, where: str) -> Any:
    if isinstance(value, Mapping):
        return encode_document(value, as_array, where=where)
    if isinstance(value, (list, tuple)):
        return [_encode(part, as_array, f"{where}.{index}") for index, part in enumerate(value)]
    try:
        if isinstance(value, np.generic):
            return _scalar(value)
        parts = None if as_array is None else as_array(value)
        parts = numpy_parts(value) if parts is None else parts
    except CodecError as error:
        raise CodecError(f"{where}: {error.message}", field=where) from error
    if parts is None:
        return value
    if len(parts.shape) == 1 and parts.dtype in _VECTOR_HEADERS:
        return Binary(_VECTOR_HEADERS[parts.dtype] + bytes(parts.data), _VECTOR_SUBTYPE)
    return {"dtype": parts.dtype, "shape": list(parts.shape), "data": bytes(parts.data)}


def _scalar(value: np.generic) -> Any:
    if value.dtype.kind == "M":  # BSON dates are milliseconds; `item` of a finer date would be a bare integer
        return value.astype("datetime64[ms]").item()
    plain = value.item()
    if not isinstance(plain, (bool, int, float, str, bytes)) or value.dtype.kind == "m":
        raise CodecError(f"a number of dtype {value.dtype} cannot be stored; use a plain Python value")
    return plain


def _decode(value: Any, from_array: FromArray) -> Any:
    if isinstance(value, Binary) and value.subtype == _VECTOR_SUBTYPE:
        parts = _vector(value)
        return value if parts is None else from_array(parts)
    if isinstance(value, Mapping):
        parts = _sub_document(value)
        return decode_document(value, from_array) if parts is None else from_array(parts)
    if isinstance(value, list):
        return [_decode(part, from_array) for part in value]
    return value


def _vector(value: Binary) -> ArrayParts | None:
    dtype = _VECTOR_DTYPES.get(bytes(value[:2]))
    if dtype is None:
        return None
    size, rest = divmod(len(value) - 2, np.dtype(dtype).itemsize)
    return None if rest else ArrayParts(dtype=dtype, shape=(size,), data=bytes(value[2:]))


def _sub_document(value: Mapping[str, Any]) -> ArrayParts | None:
    if set(value) != _ARRAY_KEYS:
        return None
    dtype, shape, data = value["dtype"], value["shape"], value["data"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(data, bytes):
        return None
    element = _element(dtype)
    if element is None or not all(isinstance(n, int) and type(n) is not bool and n >= 0 for n in shape):
        return None
    try:
        np.frombuffer(data, element).reshape(shape)
    except (ValueError, OverflowError):  # the bytes do not fit, or numpy has no such many dimensions
        return None
    return ArrayParts(dtype=dtype, shape=tuple(shape), data=bytes(data))


def _element(dtype: str) -> np.dtype[Any] | None:
    if dtype == "bfloat16":
        return np.dtype("<u2")
    try:
        found = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError):
        return None
    return found if found.kind in "biufc" else None
