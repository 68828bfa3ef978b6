"""Single samples, for a `transform` or a `collate_fn`; without those nobody builds samples.

Always: a sample has the structure of the key; arrays are tensors in it, plain numbers Python numbers, plain
lists Python lists; what a transform returns is the sample, and samples are stacked by the rule of `tensors`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from mongotorch.data.columns import Columns
from mongotorch.data.tensors import column_tensor, one_tensor, stack
from mongotorch.errors import ShapeError
from mongotorch.key import Key, check_signature


@final
@dataclass(frozen=True, kw_only=True)
class SampleBuilder:
    """Builds a batch out of columns by way of samples; runs in a worker as well as here.

    Attributes:
        key: The structure of a sample.
        transform: What makes of it the sample that counts; None takes it as it is.
        signature: How the sample goes into `transform`.
        collate_fn: Makes a batch of a list of samples; None stacks them.
    """

    key: Key
    transform: Callable[..., Any] | None = None
    signature: str = "*args"
    collate_fn: Callable[[list[Any]], Any] | None = None

    def __call__(self, columns: Columns) -> Any:
        """The batch of the rows.

        Raises:
            DataError: Samples that cannot be stacked; what `transform` and `collate_fn` raise goes through.
        """
        samples = build(columns, self.key)
        if self.transform is not None:
            samples = [call(self.transform, sample, self.key, self.signature) for sample in samples]
        if self.collate_fn is not None:
            return self.collate_fn(samples)
        return collate(samples, columns.ids.values())


def build(columns: Columns, key: Key) -> list[Any]:
    """The samples of the rows, in the structure of the key."""
    values = {path: _values(columns, path) for path in key.paths}
    return [key.arrange(lambda path, row=row: values[path][row]) for row in range(len(columns))]  # type: ignore[misc]


def call(function: Callable[..., Any], sample: Any, key: Key, signature: str) -> Any:
    """What `function` returns for a sample that goes in by `signature`.

    Raises:
        SignatureError: No such signature.
    """
    check_signature(signature)
    if signature == "singleton":
        return function(sample)
    positional, named = _arguments(sample, key)
    if signature == "*args":
        return function(*positional, *named.values())
    if signature == "**kwargs":
        return function(**dict(zip(key.names(), [*positional, *named.values()], strict=True)))
    return function(*positional, **named)


def collate(samples: Sequence[Any], ids: Sequence[Any] | None = None, field: str = "sample") -> Any:
    """The batch of samples: tuples, lists and dicts are kept, what is inside them is stacked.

    Args:
        samples: What the transform returned, one each row.
        ids: The `_id`s of the rows, for errors.
        field: What errors call the place.

    Raises:
        DataError: Something that has no tensor (strings, dates and the like stay lists).
        ShapeError: Samples of different structure or shape.
    """
    first = samples[0]
    if isinstance(first, str | bytes) or first is None:
        return list(samples)
    if isinstance(first, Mapping):
        _alike(samples, ids, field, Mapping, set(first))
        return {k: collate([s[k] for s in samples], ids, f"{field}[{k!r}]") for k in first}
    if isinstance(first, tuple) or (isinstance(first, list) and not _numbers(first)):
        _alike(samples, ids, field, tuple | list, len(first))
        parts = [collate([s[n] for s in samples], ids, f"{field}[{n}]") for n in range(len(first))]
        if isinstance(first, list):
            return parts
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    if isinstance(first, Tensor | np.ndarray | np.generic | bool | int | float | list):
        return stack(samples, field=field, ids=ids)
    return list(samples)


def _arguments(sample: Any, key: Key) -> tuple[Sequence[Any], Mapping[str, Any]]:
    if key.form == "single":
        return [sample], {}
    if key.form == "tuple":
        return sample, {}
    return ([], sample) if key.form == "dict" else sample


def _values(columns: Columns, path: str) -> Sequence[Any]:
    column = columns[path]
    if column.kind != "array":
        return [_value(value) for value in column.values()]
    whole = column_tensor(columns, path)
    return [] if whole is None else whole.unbind()


def _value(value: Any) -> Any:
    return one_tensor(value) if isinstance(value, np.ndarray) else value


def _numbers(value: list[Any]) -> bool:
    return all(_numbers(v) if isinstance(v, list) else isinstance(v, bool | int | float) for v in value)


def _alike(samples: Sequence[Any], ids: Sequence[Any] | None, field: str, kind: Any, shape: Any) -> None:
    for n, sample in enumerate(samples):
        same = isinstance(sample, kind) and (set(sample) if kind is Mapping else len(sample)) == shape
        if not same:
            document_id = None if ids is None else ids[n]
            raise ShapeError(
                f"{field} of document {document_id!r} has another structure than the first of its batch; "
                "let transform return the same structure for every document",
                document_id=document_id,
                field=field,
            )


def pinned(batch: Any) -> Any:
    """The batch in page-locked memory, where there is an accelerator to copy it to."""
    return on_tensors(Tensor.pin_memory, batch) if torch.cuda.is_available() else batch


def on_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The same structure with a function done on its tensors."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {name: on_tensors(function, part) for name, part in batch.items()}
    if isinstance(batch, list | tuple) and not hasattr(batch, "_fields"):
        return type(batch)(on_tensors(function, part) for part in batch)
    return batch
