"""Arrays in user documents, as plain BSON that any client can read.

Always: a 1-D float32 or int8 array is a BSON vector (binary subtype 9); any other array is the sub-document
`{"dtype", "shape", "data"}`, little-endian in C order; dtype and shape come back exactly. A sub-document that
only looks alike (another key, bytes that do not fit) stays what it is. Vectors: BSON specification, subtype 9.

numpy arrays and scalars as components hold them: their bytes beside the record, readable without pickle.

Always: dtype and shape come back exactly (numbers in the native byte order); an array of objects, or a subclass
of the array that says more than its numbers (a masked array), is left to dill.

Which BSON values are stored arrays, and the numpy arrays they stand for.

Always: what is not exactly a stored array (another key, a wrong byte count, an unknown dtype) stays the plain
value that `bson.decode` gave. The same rules as the codec of documents, kept here in a form without blobs.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any, final

import numpy as np
from bson.binary import VECTOR_SUBTYPE, Binary, BinaryVectorDtype
from numpy.lib.format import descr_to_dtype, dtype_to_descr
from numpy.typing import NDArray

from mongotorch.codecs.base import Codec, Get, Put
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


_NUMBERS = "biufc"


@final
class ArrayCodec(Codec):
    """numpy arrays and scalars of any dtype without objects.

    The record: `dtype` (numpy's name for numbers, else its `.npy` description), `shape`, `blob`, and `scalar`
    for what is no array.
    """

    name = "array"

    def handles(self, value: Any) -> bool:
        """Whether it is a plain array or a scalar, of a dtype that can be described."""
        plain = type(value) in (np.ndarray, np.memmap) or isinstance(value, np.generic)
        return plain and (value.dtype.kind in _NUMBERS or _is_described(value.dtype))

    def encode(self, value: Any, put: Put, *, where: str) -> dict[str, Any]:
        """The dtype and shape, and the bytes in a blob. Raises: CodecError for what is no such array."""
        if not self.handles(value):
            raise CodecError(f"{where} is no numpy array that can be stored without objects", field=where)
        array = np.asarray(value)
        parts = numpy_parts(array) if array.dtype.kind in _NUMBERS else _described_parts(array)
        assert parts is not None  # noqa: S101 - an array always has parts
        record = {"dtype": parts.dtype, "shape": list(parts.shape), "blob": put(parts.data)}
        return record | ({"scalar": True} if isinstance(value, np.generic) else {})

    def decode(self, record: Mapping[str, Any], get: Get) -> Any:
        """A writable array, or the scalar."""
        parts = ArrayParts(dtype=record["dtype"], shape=tuple(record["shape"]), data=get(record["blob"]))
        dtype = _dtype(parts.dtype)
        if dtype.kind in _NUMBERS:
            array = numpy_array(parts)
        else:
            array = np.frombuffer(parts.data, dtype).reshape(parts.shape).copy()
        return array[()] if record.get("scalar") else array


def _is_described(dtype: np.dtype[Any]) -> bool:
    if dtype.hasobject or not dtype.itemsize or dtype.kind not in "mMSUV" or dtype.metadata:
        return False
    try:
        return bool(_dtype(_description(dtype)) == dtype)
    except (TypeError, ValueError, SyntaxError):
        return False


def _description(dtype: np.dtype[Any]) -> str:
    described = dtype_to_descr(dtype)
    return described if isinstance(described, str) else repr(described)


def _dtype(described: str) -> np.dtype[Any]:
    if not described.startswith("["):
        return np.dtype(described)
    found: np.dtype[Any] = descr_to_dtype(ast.literal_eval(described))
    return found


def _described_parts(array: np.ndarray[Any, Any]) -> ArrayParts:
    return ArrayParts(dtype=_description(array.dtype), shape=array.shape, data=array.tobytes())


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
        return _vector_value(value)
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


def _vector_value(value: Binary) -> Any:
    dtype = vector_type(bytes(value[:2]), len(value) - 2)
    return value if dtype is None else np.frombuffer(value, dtype, offset=2).copy()
