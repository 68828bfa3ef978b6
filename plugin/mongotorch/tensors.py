"""From columns to tensors, by one rule of dtypes.

Always: plain floats and lists of floats become torch's default dtype, integers int64, booleans bool; arrays
keep their dtype and shape; what has no tensor, or another shape than its neighbours, ends in an error that
names the field and the `_id`.

From the items that `predict` gets to one batch, and from the output back to one result an item.

Always: the rule of dtypes is that of training: plain floats become torch's default dtype, integers int64,
booleans bool; arrays and tensors keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mongotorch.codecs.arrays import BFloat16
from mongotorch.errors import DataError, ShapeError


def to_device(batch: Any, device: torch.device) -> Any:
    """The same structure with its tensors on a device."""
    return on_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)


def on_tensors(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """The same structure with a function done on its tensors."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {name: on_tensors(function, part) for name, part in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(on_tensors(function, part) for part in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(on_tensors(function, part) for part in batch)
    return batch


def copied(value: Any) -> Any:
    """The same structure with its tensors copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: copied(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(part) for part in value)
    return value


def pinned(batch: Any) -> Any:
    """The batch in page-locked memory, where there is an accelerator to copy it to."""
    return on_tensors(Tensor.pin_memory, batch) if torch.cuda.is_available() else batch


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


def stack_items(items: Sequence[Any]) -> Any:
    """The batch of items: a tensor of shape (n, ...), or a tuple or dict of them.

    Raises:
        ShapeError: Items of different shape, or that have no tensor.
    """
    first = items[0]
    if isinstance(first, tuple):
        return tuple(stack_items(part) for part in zip(*items, strict=True))
    if isinstance(first, Mapping):
        return {name: stack_items([item[name] for item in items]) for name in first}
    try:
        return torch.stack([_item_tensor(item) for item in items])
    except (RuntimeError, TypeError, ValueError) as error:
        raise ShapeError(
            f"the items cannot be stacked into a batch ({error}); let preprocess return tensors of one shape"
        ) from error


def unstack_items(output: Any, count: int) -> list[Any]:
    """The output of each item, without the batch dimension."""
    if isinstance(output, Tensor):
        if output.ndim and len(output) == count:
            return list(output.unbind())
        raise ShapeError(
            f"the output has shape {tuple(output.shape)} for {count} items; its first dimension must be the batch"
        )
    if isinstance(output, Mapping):
        parts = {name: unstack_items(part, count) for name, part in output.items()}
        return [{name: part[n] for name, part in parts.items()} for n in range(count)]
    if isinstance(output, list | tuple):
        columns = [unstack_items(part, count) for part in output]
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


def _item_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.as_tensor(np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value)
