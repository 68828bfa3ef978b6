"""numpy arrays and scalars as components hold them: their bytes beside the record, readable without pickle.

Always: dtype and shape come back exactly (numbers in the native byte order); an array of objects, or a subclass
of the array that says more than its numbers (a masked array), is left to dill.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any, final

import numpy as np
from numpy.lib.format import descr_to_dtype, dtype_to_descr

from mongotorch.codecs.arrays import ArrayParts, numpy_array, numpy_parts
from mongotorch.codecs.base import Codec, Get, Put
from mongotorch.errors import CodecError

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
