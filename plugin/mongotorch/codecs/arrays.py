"""Stores arrays: in user documents as plain BSON that any client can read, in components as blobs.

In a document, a 1-D float32 or int8 array is a BSON vector (binary subtype 9 of the BSON specification), and any
other array is a sub-document `{"dtype", "shape", "data"}`, little-endian in C order. What is neither
(another key, a byte count that does not fit, an unknown dtype) stays the plain value that it is.

Guarantees: dtype and shape come back exactly, bfloat16 included, which numpy does not have.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final, final

import numpy as np
from bson.binary import VECTOR_SUBTYPE, Binary
from numpy.lib.format import descr_to_dtype, dtype_to_descr
from numpy.typing import NDArray

from mongotorch.codecs.base import Codec, Get, Put
from mongotorch.errors import CodecError

BFLOAT16: Final = "bfloat16"
_VECTOR_TYPES: Final[Mapping[bytes, np.dtype[Any]]] = {  # by the header: element type and padding
    b"\x27\x00": np.dtype("<f4"),
    b"\x03\x00": np.dtype("i1"),
}
_VECTOR_HEADERS: Final = {dtype.name: header for header, dtype in _VECTOR_TYPES.items()}
_ARRAY_KEYS: Final = frozenset({"dtype", "shape", "data"})
_NUMERIC_KINDS: Final = "biufc"
_NESTING: Final = frozenset({Binary, dict, list})  # the types in a list that can be or hold stored arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayParts:
    """An array without a library: `data` is little-endian, C order; `dtype` is numpy's name, or `bfloat16`."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


AsArray = Callable[[Any], ArrayParts | None]
FromArray = Callable[[ArrayParts], Any]


class BFloat16(np.ndarray[Any, np.dtype[np.uint16]]):
    """Bit patterns of bfloat16 numbers as uint16."""


def dtype_name(array: NDArray[Any]) -> str:
    """The numpy name of the element type, or `bfloat16`."""
    return BFLOAT16 if isinstance(array, BFloat16) else array.dtype.name


def element_type(name: object) -> np.dtype[Any] | None:
    """The little-endian numpy dtype of a stored dtype name, uint16 for bfloat16; None if it is no numeric one."""
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
    """The element type of a vector with this two-byte header and `size` bytes after it; None if it is none."""
    dtype = _VECTOR_TYPES.get(bytes(header))
    return dtype if dtype is not None and not size % dtype.itemsize else None


def stored_array(value: Any) -> NDArray[Any] | None:
    """The array that a BSON value stands for: a read-only little-endian view of its bytes; None if it is none."""
    if isinstance(value, Binary):
        dtype = vector_type(value[:2], len(value) - 2) if value.subtype == VECTOR_SUBTYPE else None
        return None if dtype is None else np.frombuffer(value, dtype, offset=2)
    if not isinstance(value, dict) or value.keys() != _ARRAY_KEYS:
        return None
    dtype, shape, data = element_type(value["dtype"]), value["shape"], value["data"]
    if dtype is None or not isinstance(shape, list) or not isinstance(data, bytes):
        return None
    if not all(isinstance(size, int) and type(size) is not bool and size >= 0 for size in shape):
        return None
    try:
        array = np.frombuffer(data, dtype).reshape(shape)
    except (ValueError, OverflowError):  # the bytes do not fit, or there are more dimensions than numpy has
        return None
    return array.view(BFloat16) if value["dtype"] == BFLOAT16 else array


def restore(value: Any) -> Any:
    """A decoded BSON value with a writable numpy array (`BFloat16` for bfloat16) for every array stored in it."""
    return _map_arrays(lambda array: array.copy(), value)


def decode_document(document: Mapping[str, Any], from_array: FromArray | None = None) -> dict[str, Any]:
    """A document with its stored arrays made by `from_array`; `numpy_array` unless given."""
    make = from_array or numpy_array
    return {key: _map_arrays(lambda array: make(_parts(array)), value) for key, value in document.items()}


def encode_document(
    document: Mapping[str, Any], as_array: AsArray | None = None, *, where: str = ""
) -> dict[str, Any]:
    """A document with its arrays as BSON.

    Args:
        document: What a user inserts.
        as_array: Takes arrays of another library apart and returns None for anything else; numpy is always known.
        where: The path so far, for errors.

    Raises:
        CodecError: An array that cannot be stored; `field` is its path.
    """
    return {
        key: _encode(value, as_array, f"{where}.{key}" if where else str(key)) for key, value in document.items()
    }


def numpy_parts(value: Any) -> ArrayParts | None:
    """The parts of a numpy array; None for anything else. Raises: CodecError for arrays of objects or text."""
    if not isinstance(value, np.ndarray):
        return None
    if isinstance(value, np.ma.MaskedArray):
        raise CodecError("a masked array would lose its mask; store its data and its mask as two fields")
    if value.dtype.kind not in _NUMERIC_KINDS:
        raise CodecError(f"an array of dtype {value.dtype} cannot be stored; use numbers or booleans, or a list")
    return _parts(value)


def numpy_array(parts: ArrayParts) -> Any:
    """A writable numpy array. Raises: CodecError for bfloat16, which numpy does not have."""
    if parts.dtype == BFLOAT16:
        raise CodecError("numpy has no bfloat16; read this document as tensors")
    dtype = np.dtype(parts.dtype)
    return np.frombuffer(parts.data, dtype.newbyteorder("<")).reshape(parts.shape).astype(dtype)


def _parts(array: NDArray[Any]) -> ArrayParts:
    flat = np.asarray(array, array.dtype.newbyteorder("<"), order="C").reshape(-1)
    return ArrayParts(dtype=dtype_name(array), shape=array.shape, data=flat.view(np.uint8).data)


def _map_arrays(function: Callable[[NDArray[Any]], Any], value: Any) -> Any:
    """A decoded BSON value, at any depth, with a function applied to the arrays that are stored in it."""
    if isinstance(value, list):
        return value if _NESTING.isdisjoint(map(type, value)) else [_map_arrays(function, v) for v in value]
    if not isinstance(value, dict | Binary):
        return value
    array = stored_array(value)
    if array is not None:
        return function(array)
    return {key: _map_arrays(function, v) for key, v in value.items()} if isinstance(value, dict) else value


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
        return Binary(_VECTOR_HEADERS[parts.dtype] + bytes(parts.data), VECTOR_SUBTYPE)
    return {"dtype": parts.dtype, "shape": list(parts.shape), "data": bytes(parts.data)}


def _scalar(value: np.generic) -> Any:
    if value.dtype.kind == "M":  # BSON dates are milliseconds; `item` of a finer date would be a bare integer
        return value.astype("datetime64[ms]").item()
    plain = value.item()
    if not isinstance(plain, (bool, int, float, str, bytes)) or value.dtype.kind == "m":
        raise CodecError(f"a number of dtype {value.dtype} cannot be stored; use a plain Python value")
    return plain


@final
class ArrayCodec(Codec):
    """numpy arrays and scalars of any dtype without objects, in components; a masked array is left to dill.

    The record: `dtype` (numpy's name for numbers, else its `.npy` description), `shape`, `blob`, and `scalar`
    for what is no array.
    """

    name = "array"
    types = (np.ndarray, np.generic)

    def handles(self, value: Any) -> bool:
        """Whether it is a plain array or a scalar, of a dtype that can be described."""
        plain = type(value) in (np.ndarray, np.memmap) or isinstance(value, np.generic)
        return plain and (value.dtype.kind in _NUMERIC_KINDS or _is_described(value.dtype))

    def encode(self, value: Any, put: Put, *, where: str) -> dict[str, Any]:
        """The dtype and shape, and the bytes in a blob. Raises: CodecError for what is no such array."""
        if not self.handles(value):
            raise CodecError(f"{where} is no numpy array that can be stored without objects", field=where)
        array = np.asarray(value)
        if array.dtype.kind in _NUMERIC_KINDS:
            parts = _parts(array)
        else:
            parts = ArrayParts(dtype=_description(array.dtype), shape=array.shape, data=array.tobytes())
        record = {"dtype": parts.dtype, "shape": list(parts.shape), "blob": put(parts.data)}
        return record | ({"scalar": True} if isinstance(value, np.generic) else {})

    def decode(self, record: Mapping[str, Any], get: Get) -> Any:
        """A writable array, or the scalar."""
        parts = ArrayParts(dtype=record["dtype"], shape=tuple(record["shape"]), data=get(record["blob"]))
        dtype = _described_dtype(parts.dtype)
        if dtype.kind in _NUMERIC_KINDS:
            array = numpy_array(parts)
        else:
            array = np.frombuffer(parts.data, dtype).reshape(parts.shape).copy()
        return array[()] if record.get("scalar") else array


def _is_described(dtype: np.dtype[Any]) -> bool:
    if dtype.hasobject or not dtype.itemsize or dtype.kind not in "mMSUV" or dtype.metadata:
        return False
    try:
        return bool(_described_dtype(_description(dtype)) == dtype)
    except (TypeError, ValueError, SyntaxError):
        return False


def _description(dtype: np.dtype[Any]) -> str:
    described = dtype_to_descr(dtype)
    return described if isinstance(described, str) else repr(described)


def _described_dtype(described: str) -> np.dtype[Any]:
    if not described.startswith("["):
        return np.dtype(described)
    found: np.dtype[Any] = descr_to_dtype(ast.literal_eval(described))
    return found
