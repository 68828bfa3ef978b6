"""Maps, copies, moves, stacks, splits and compares tensors, alone or in any nesting of lists, tuples and dicts.

A structure is a tensor, or a list, tuple, mapping or dataclass of structures; everything else in it is left as it
is. What comes out has the same types as what went in: namedtuples, `OrderedDict`s and other subclasses are
rebuilt, a dict's with its attributes, and a mapping that cannot be rebuilt becomes a dict. `map_contained` also
looks into functions and objects: a partial, a closure or attributes may hold tensors and modules.

Dtypes: plain floats and lists of them become torch's default dtype, integers int64, booleans bool; arrays and
tensors keep theirs.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import types
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mongotorch.codecs.arrays import BFloat16
from mongotorch.errors import DataError, ShapeError

_MOST_DEEP: Final = 8
_MOST_PARTS: Final = 10_000


class Indexed(Protocol):
    """What has a value for each row, made when it is asked for."""

    def __getitem__(self, row: int, /) -> Any:
        """The value of a row."""
        ...


def map_tensors(
    function: Callable[[Tensor], Any], value: Any, other: Callable[[Any], Any] = lambda part: part
) -> Any:
    """The same structure with a function applied to its tensors, and `other` to what else is in it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        parts: Any = {name: map_tensors(function, part, other) for name, part in value.items()}
    elif isinstance(value, list | tuple):
        parts = [map_tensors(function, part, other) for part in value]
    elif _is_dataclass(value):
        parts = {name: map_tensors(function, part, other) for name, part in _fields(value).items()}
    else:
        return other(value)
    return _rebuild(value, parts, lambda part: map_tensors(function, part, other))


def leaves(value: Any) -> Iterator[Any]:
    """Everything in a structure that is no list, tuple or mapping, in order."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def copy_tensors(value: Any) -> Any:
    """The same structure with detached copies of its tensors."""
    return map_tensors(lambda tensor: tensor.detach().clone(), value)


def copied_values(value: Any) -> Any:
    """The same structure with detached copies of its tensors, and copies of what else in it can be copied."""
    return map_tensors(lambda tensor: tensor.detach().clone(), value, _copied_other)


def _copied_other(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001 - whatever an object says to that, it is kept as it is
        return value


def to_device(value: Any, device: torch.device) -> Any:
    """The same structure with its tensors on a device."""
    if type(value) is tuple:
        for part in value:
            if type(part) is not Tensor or part.device != device:
                break
        else:
            return value  # as most batches are where there is no accelerator
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), value)


def pin_memory(value: Any) -> Any:
    """The same structure in page-locked memory, where there is an accelerator to copy it to."""
    return map_tensors(Tensor.pin_memory, value) if torch.cuda.is_available() else value


def count_rows(batch: Any) -> int:
    """How many samples a batch has: the first dimension of its first tensor with more than one row, else 1."""
    sizes = (len(part) for part in leaves(batch) if isinstance(part, Tensor) and part.ndim)
    return next((size for size in sizes if size != 1), 1)


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type | nn.Module)


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that are set, by name."""
    names = [field.name for field in dataclasses.fields(value)]
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _rebuild(container: Any, parts: Any, other: Callable[[Any], Any] = lambda part: part) -> Any:
    """A container of the type of another, and with its attributes.

    Args:
        container: The other.
        parts: A list of parts for a sequence, a dict of them for a mapping or a dataclass.
        other: What becomes of an attribute that is none of the parts.
    """
    kind: Any = type(container)
    if kind in (list, dict):
        return parts
    if isinstance(container, tuple) and hasattr(container, "_fields"):
        return kind(*parts)
    try:
        if isinstance(container, dict | UserDict):  # a copy keeps what else it holds, such as a default factory
            built = _copied(container)
            for name, part in parts.items():
                built[name] = part
            _rebuild_attributes(container, built, parts, other)
            return built
        if not isinstance(container, Mapping | list | tuple):
            return _rebuild_dataclass(container, parts)
        return kind(parts)
    except TypeError:
        return tuple(parts) if isinstance(container, tuple) else parts


def _copied(container: Any) -> Any:
    kind: Any = type(container)
    try:
        return copy.copy(container)
    except Exception:  # noqa: BLE001 - a `__getattr__` that knows items only fails in it in many ways
        built = kind.__new__(kind)
        built.__dict__.update(container.__dict__)
        return built


def _rebuild_attributes(container: Any, built: Any, parts: Any, other: Callable[[Any], Any]) -> None:
    """Give a copied mapping the attributes of the other, the new part where one is an item too."""
    attributes: dict[str, Any] = getattr(container, "__dict__", {})
    if attributes is container:  # its items are its attributes
        built.__dict__ = built
        return
    new = {id(part): parts[name] for name, part in container.items()}
    for name, part in attributes.items():
        if part is not container and not (isinstance(container, UserDict) and name == "data"):
            built.__dict__[name] = new[id(part)] if id(part) in new else other(part)


def _rebuild_dataclass(value: Any, parts: Mapping[str, Any]) -> Any:
    changed = {name: part for name, part in parts.items() if part is not getattr(value, name)}
    if not changed:
        return value
    built = copy.copy(value)
    for name, part in changed.items():
        object.__setattr__(built, name, part)  # it may be frozen
    return built


def map_contained(
    value: Any,
    tensor: Callable[[Tensor], Any],
    module: Callable[[nn.Module], Any],
    *,
    leave: type | tuple[type, ...] = (),
) -> Any:
    """The same function or object with functions applied to the tensors and modules that it holds.

    It is looked into partials, closures, default arguments, bound methods, attributes and containers, eight deep,
    and at 10,000 things at most.

    Args:
        value: An objective, say. It is not changed: where something in it is replaced, it is rebuilt.
        tensor: Applied to tensors and parameters.
        module: Applied to modules.
        leave: Classes whose objects are not looked into.
    """
    return _ContainedWalk(tensor, module, leave).mapped(value, 0)


@final
class _ContainedWalk:
    """One walk of `map_contained`, which comes to everything once."""

    def __init__(
        self, tensor: Callable[[Tensor], Any], module: Callable[[nn.Module], Any], leave: type | tuple[type, ...]
    ) -> None:
        self._tensor, self._module = tensor, module
        self._leave = (str, bytes, int, float, type, leave)
        self._seen: dict[int, tuple[Any, Any]] = {}  # with what it was found for, which so keeps its id

    def mapped(self, value: Any, deep: int) -> Any:
        if value is None or isinstance(value, self._leave):
            return value
        if id(value) in self._seen:
            return self._seen[id(value)][1]
        if deep > _MOST_DEEP or len(self._seen) > _MOST_PARTS:
            return value
        self._seen[id(value)] = (value, value)  # what refers to itself is not followed again
        result = self._mapped(value, lambda part: self.mapped(part, deep + 1))
        self._seen[id(value)] = (value, result)
        return result

    def _mapped(self, value: Any, inside: Callable[[Any], Any]) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, functools.partial):
            parts = [value.func, value.args, value.keywords]
            made = [inside(part) for part in parts]
            return value if _are_same(made, parts) else functools.partial(made[0], *made[1], **made[2])
        if isinstance(value, list | tuple | Mapping):
            parts = list(value.values()) if isinstance(value, Mapping) else list(value)
            same = _are_same([inside(part) for part in parts], parts)
            return value if same else map_tensors(inside, value, inside)
        if isinstance(value, types.MethodType):
            owner = inside(value.__self__)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if isinstance(value, types.FunctionType):
            return _map_function(value, inside)
        return _map_attributes(value, inside)


def _are_same(first: Sequence[Any], second: Sequence[Any]) -> bool:
    return all(one is other for one, other in zip(first, second, strict=True))


def _map_function(function: types.FunctionType, inside: Callable[[Any], Any]) -> Any:
    parts = [_content(cell) for cell in function.__closure__ or ()]
    made = [inside(part) for part in parts]
    defaults, named = inside(function.__defaults__), inside(function.__kwdefaults__)
    if _are_same([*made, defaults, named], [*parts, function.__defaults__, function.__kwdefaults__]):
        return function
    closure = tuple(
        cell if new is old else types.CellType(new)
        for cell, new, old in zip(function.__closure__ or (), made, parts, strict=True)
    )
    rebuilt: Any = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, defaults, closure
    )
    rebuilt.__kwdefaults__ = named
    functools.update_wrapper(rebuilt, function)
    del rebuilt.__wrapped__  # it holds what was replaced
    return rebuilt


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was assigned yet
        return None


def _map_attributes(value: Any, inside: Callable[[Any], Any]) -> Any:
    attributes = getattr(value, "__dict__", None)
    if not isinstance(attributes, dict) or isinstance(value, type | types.ModuleType):
        return value
    made = {name: inside(part) for name, part in attributes.items() if part is not value}
    changed = {name: part for name, part in made.items() if part is not attributes[name]}
    if not changed:
        return value
    rebuilt = copy.copy(value)
    for name, part in changed.items():
        object.__setattr__(rebuilt, name, part)
    return rebuilt


def from_array(values: npt.NDArray[Any], *, plain: bool) -> Tensor:
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


def one_tensor(value: Any, field: str = "value", document_id: Any = None) -> Tensor:
    """The tensor of one value: a tensor, an array, a number, or a rectangular list of numbers.

    Args:
        value: The value.
        field: Its name, for errors.
        document_id: The `_id` of its document, for errors.

    Raises:
        DataError: It has none.
    """
    if isinstance(value, Tensor):
        return value
    array: npt.NDArray[Any] | None
    if isinstance(value, np.ndarray | np.generic):
        array, plain = np.asarray(value), False
    else:
        array, plain = _plain_array(value), True
    if array is None or array.dtype.kind not in "biufc":
        where = "" if document_id is None else f" of document {document_id!r}"
        raise DataError(
            f"field {field!r}{where} holds {_describe(value)}, of which torch has no tensor; "
            "turn it into numbers in a transform, or batch it in a collate_fn",
            document_id=document_id,
            field=field,
        )
    tensor = from_array(array.reshape(-1), plain=plain).reshape(array.shape)
    return tensor.view(torch.bfloat16) if isinstance(value, BFloat16) else tensor


def stack(values: Sequence[Any], *, field: str, ids: Indexed | None = None) -> Tensor:
    """One tensor of single values, shape (n, ...); dtypes that differ are promoted as torch promotes.

    Args:
        values: What `one_tensor` takes, n of them.
        field: Their name, for errors.
        ids: The `_id`s of their documents, for errors.

    Raises:
        DataError: A value has no tensor.
        ShapeError: Shapes differ.
    """
    kinds = set(map(type, values))
    if len(kinds) == 1 and type(values[0]) in (bool, int, float):
        with contextlib.suppress(RuntimeError, OverflowError):  # an integer that no tensor holds
            return torch.tensor(values)
    if kinds == {Tensor} and len({value.dtype for value in values}) == 1:
        with contextlib.suppress(RuntimeError):  # of different shapes, as is said below
            return torch.stack(list(values))
    tensors = [
        value if isinstance(value, Tensor) else one_tensor(value, field, None if ids is None else ids[n])
        for n, value in enumerate(values)
    ]
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


def concat(parts: Sequence[Tensor], *, field: str) -> Tensor:
    """The rows of several tensors, one after the other. Raises: ShapeError when their rows differ in shape."""
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


def collate(samples: Sequence[Any], ids: Indexed | None = None, field: str = "sample") -> Any:
    """The batch of training samples: their structure, with what is inside stacked by `stack`.

    Args:
        samples: One for each row. A list of numbers is one value; strings, dates and the like become lists.
        ids: The `_id`s of the rows, for errors.
        field: The name of the samples, for errors.

    Raises:
        DataError: A value that has no tensor among values that have one.
        ShapeError: Samples of different structure or shape.
    """
    first = samples[0]
    if isinstance(first, Mapping | tuple) or (isinstance(first, list) and not _is_numbers(first)):
        return _transpose(samples, lambda parts, name: collate(parts, ids, name), ids, field)
    if isinstance(first, Tensor | np.ndarray | np.generic | bool | int | float | list):
        return stack(samples, field=field, ids=ids)
    return list(samples)


def stack_inputs(items: Sequence[Any]) -> Any:
    """The batch of items to predict: tuples and mappings keep their structure, and a list is one value.

    Raises:
        ShapeError: Items of different structure or shape, or that have no tensor.
    """
    if isinstance(items[0], tuple | Mapping):
        return _transpose(items, lambda parts, _: stack_inputs(parts), None, "input")
    try:
        return torch.stack([_input_tensor(item) for item in items])
    except (RuntimeError, TypeError, ValueError) as error:
        raise ShapeError(
            f"the items cannot be stacked into a batch ({error}); let preprocess return tensors of one shape"
        ) from error


def unstack(output: Any, count: int) -> list[Any]:
    """What a module gave for `count` items, taken apart: one structure an item, without the batch dimension.

    Raises:
        ShapeError: A tensor whose first dimension is not the batch.
    """
    if isinstance(output, Tensor):
        if output.ndim and len(output) == count:
            return list(output.unbind())
        raise ShapeError(
            f"the output has shape {tuple(output.shape)} for {count} items; its first dimension must be the batch"
        )
    if isinstance(output, list | tuple):
        parts = [unstack(part, count) for part in output]
        return [_rebuild(output, [part[n] for part in parts]) for n in range(count)]
    if not isinstance(output, Mapping) and not _is_dataclass(output):
        return [output] * count
    items = output if isinstance(output, Mapping) else _fields(output)
    named = {name: unstack(part, count) for name, part in items.items()}
    return [
        _rebuild(
            output, {name: part[n] for name, part in named.items()}, functools.partial(_item, count=count, n=n)
        )
        for n in range(count)
    ]


def _item(attribute: Any, count: int, n: int) -> Any:
    """What an attribute holds of one of `count` items; all of it where it is not about items."""
    try:
        return unstack(attribute, count)[n]
    except ShapeError:
        return attribute


def differences(first: Any, second: Any, where: str = "") -> Iterator[str]:
    """The names of what differs in two modules, states, or structures of tensors and plain values.

    Tensors are compared by their memory: 0.0 and -0.0 differ, and a NaN equals itself.

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
                yield from differences(first[key], second[key], name)
            else:
                yield name
    elif isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        for at, (one, other) in enumerate(zip(first, second, strict=True)):
            yield from differences(one, other, f"{where}[{at}]")
    elif type(first) is not type(second) or first != second:
        yield where


def _transpose(
    samples: Sequence[Any], batch: Callable[[list[Any], str], Any], ids: Indexed | None, field: str
) -> Any:
    """One container like each of the samples, of `batch(parts, field)` for the parts at each place."""
    first = samples[0]
    mapping = isinstance(first, Mapping)
    if set(map(type, samples)) == {tuple} and set(map(len, samples)) == {len(first)}:
        columns = map(list, zip(*samples, strict=True))
        return tuple(batch(parts, f"{field}[{n}]") for n, parts in enumerate(columns))
    names = set(first) if mapping else set()
    for n, sample in enumerate(samples):
        same = isinstance(sample, Mapping) if mapping else isinstance(sample, tuple | list)
        if not same or (set(sample) != names if mapping else len(sample) != len(first)):
            document_id = None if ids is None else ids[n]
            where = "" if ids is None else f" of document {document_id!r}"
            raise ShapeError(
                f"{field}{where} has another structure than the first of its batch; let transform or preprocess "
                "return the same structure every time",
                document_id=document_id,
                field=field,
            )
    if mapping:
        parts: Any = {name: batch([sample[name] for sample in samples], f"{field}[{name!r}]") for name in first}
    else:
        parts = [batch([sample[n] for sample in samples], f"{field}[{n}]") for n in range(len(first))]
    return _rebuild(first, parts)


def _plain_array(value: Any) -> npt.NDArray[Any] | None:
    if not isinstance(value, bool | int | float | list | tuple):
        return None
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):  # lists in a list, of different lengths
        return None
    return array.astype(np.float64) if array.size == 0 else array


def _input_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.as_tensor(np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value)


def _is_numbers(value: list[Any]) -> bool:
    return all(_is_numbers(v) if isinstance(v, list) else isinstance(v, bool | int | float) for v in value)


def _describe(value: Any) -> str:
    return "lists of different lengths or types" if isinstance(value, list) else type(value).__name__


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    one, other = (part.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for part in (first, second))
    return torch.equal(one, other)


def to_floats(scalars: Sequence[Tensor | float]) -> list[float]:
    """Numbers, and tensors of one element, as floats: one transfer for all where they are alike."""
    try:
        values: list[float] = torch.stack(scalars).detach().double().flatten().tolist()  # type: ignore[arg-type]
    except (TypeError, RuntimeError):  # none, other numbers among them, other shapes, or several devices
        return [float(one) for one in scalars]
    return values


def device_memory_bytes(device: torch.device) -> int | None:
    """The most memory that tensors of this process had on an accelerator so far; None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def synchronize(device: torch.device | None) -> None:
    """Wait until an accelerator has done what it was given; the CPU has."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device is not None and device.type == "mps":
        torch.mps.synchronize()
