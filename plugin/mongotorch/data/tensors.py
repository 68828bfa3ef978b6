"""From columns to tensors, by one rule of dtypes.

Always: plain floats and lists of floats become torch's default dtype, integers int64, booleans bool; arrays
keep their dtype and shape; what has no tensor, or another shape than its neighbours, ends in an error that
names the field and the `_id`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mongotorch.data.arrayvalues import BFLOAT16, BFloat16
from mongotorch.data.columns import Columns
from mongotorch.errors import DataError, ShapeError


def array_tensor(values: npt.NDArray[Any], *, plain: bool) -> Tensor:
    """A tensor of an array, writable and contiguous; it shares the array's memory where that is possible.

    Args:
        values: Shape (n, ...), numeric or boolean.
        plain: Whether it came from BSON numbers, whose float64 becomes the default dtype.
    """
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    if any(stride % native.itemsize for stride in native.strides):  # a view of documents, of one row perhaps
        native = native.copy()
    tensor = torch.from_numpy(np.require(native, requirements=["C", "W", "A"]))
    return tensor.to(torch.get_default_dtype()) if plain and tensor.dtype == torch.float64 else tensor


def column_tensor(columns: Columns, path: str) -> Tensor | None:
    """The tensor of a column, shape (n, ...), or None where its values are not all alike."""
    column = columns[path]
    values = column.numbers()
    if values is None:
        return None
    # Integers among doubles are a list to the column, and numbers all the same.
    tensor = array_tensor(values, plain=column.plain or isinstance(column.data, list))
    return tensor.view(torch.bfloat16) if column.dtype == BFLOAT16 else tensor


def stack(values: Sequence[Any], *, field: str, ids: Sequence[Any] | None = None) -> Tensor:
    """One tensor of single values, shape (n, ...); dtypes that differ are promoted as torch promotes.

    Raises:
        DataError: A value has no tensor.
        ShapeError: Shapes differ.
    """
    tensors = [one_tensor(value, field, None if ids is None else ids[n]) for n, value in enumerate(values)]
    dtype = tensors[0].dtype
    for n, tensor in enumerate(tensors):
        if tensor.shape != tensors[0].shape:
            document_id = None if ids is None else ids[n]
            where = "" if ids is None else f" of document {document_id!r}"
            raise ShapeError(
                f"field {field!r}{where} has shape {tuple(tensor.shape)}, others of its batch have "
                f"{tuple(tensors[0].shape)}; pad them in a transform, or batch them in a collate_fn",
                document_id=document_id,
                field=field,
            )
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.stack([tensor.to(dtype) for tensor in tensors])


def join(parts: Sequence[Tensor], *, field: str) -> Tensor:
    """The rows of several tensors, one after the other.

    Raises:
        ShapeError: Shapes differ.
    """
    if len(parts) == 1:
        return parts[0]
    if len({part.shape[1:] for part in parts}) > 1:
        shapes = sorted({tuple(part.shape[1:]) for part in parts})
        raise ShapeError(
            f"field {field!r} has the shapes {shapes} in one batch; "
            "pad them in a transform, or batch them in a collate_fn",
            field=field,
        )
    return torch.cat(list(parts))


def one_tensor(value: Any, field: str = "value", document_id: Any = None) -> Tensor:
    """The tensor of one value: a tensor, an array, a number, or a rectangular list of numbers.

    Raises:
        DataError: It has none.
    """
    if isinstance(value, Tensor):
        return value
    array: npt.NDArray[Any] | None
    if isinstance(value, np.ndarray | np.generic):
        array, plain = np.asarray(value), False
    else:
        array, plain = _plain(value), True
    if array is None or array.dtype.kind not in "biufc":
        where = "" if document_id is None else f" of document {document_id!r}"
        raise DataError(
            f"field {field!r}{where} holds {_describe(value)}, of which torch has no tensor; "
            "turn it into numbers in a transform, or batch it in a collate_fn",
            document_id=document_id,
            field=field,
        )
    tensor = array_tensor(array.reshape(-1), plain=plain).reshape(array.shape)
    return tensor.view(torch.bfloat16) if isinstance(value, BFloat16) else tensor


def _plain(value: Any) -> npt.NDArray[Any] | None:
    if not isinstance(value, bool | int | float | list | tuple):
        return None
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):  # lists in a list, of different lengths
        return None
    return array.astype(np.float64) if array.size == 0 else array


def _describe(value: Any) -> str:
    return "lists of different lengths or types" if isinstance(value, list) else type(value).__name__
