"""Documents to tensors, and every operation on tensors in every kind of container."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import bson
import numpy as np
import pytest
import torch

from mongotorch.data.decode.decoder import decode
from mongotorch.data.stream.batches import SampleBuilder, build, column_tensor
from mongotorch.errors import DataError, ShapeError
from mongotorch.signature import Key
from mongotorch.tensors import (
    collate,
    copy_tensors,
    count_rows,
    leaves,
    map_tensors,
    pin_memory,
    stack,
    stack_inputs,
    to_device,
    unstack,
)


def columns(*values: Any) -> Any:
    return decode(b"".join(bson.encode({"_id": n, "x": value}) for n, value in enumerate(values)), ["x"])


def stored(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": array.tobytes()}


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1.0, 2.0], torch.float32),
        ([[1.0], [2.0]], torch.float32),
        ([1, 2], torch.int64),
        ([[1, 2], [3, 4]], torch.int64),
        ([True, False], torch.bool),
        ([1, 2.5], torch.float32),
        ([stored(np.zeros((2, 3)))] * 2, torch.float64),
        ([stored(np.zeros(2, "f2"))] * 2, torch.float16),
        ([stored(np.zeros(2, "u1"))] * 2, torch.uint8),
    ],
)
def test_numbers_become_the_default_dtype_and_arrays_keep_theirs(values: Any, dtype: torch.dtype) -> None:
    tensor = column_tensor(columns(*values), "x")
    assert tensor is not None
    assert tensor.dtype == dtype
    assert len(tensor) == 2


def test_a_bfloat16_array_comes_back_as_bfloat16() -> None:
    tensor = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    value = {"dtype": "bfloat16", "shape": [2], "data": tensor.view(torch.int16).numpy().tobytes()}
    found = column_tensor(columns(value), "x")
    assert found is not None
    assert torch.equal(found[0], tensor)


def test_shapes_that_differ_name_the_field_and_the_document() -> None:
    with pytest.raises(ShapeError) as caught:
        stack([[1.0], [1.0], [1.0, 2.0]], field="x", ids=["a", "b", "c"])
    assert (caught.value.field, caught.value.document_id) == ("x", "c")


@pytest.mark.parametrize("value", ["text", None, [[1], [1, 2]], ["a"], {"a": 1}])
def test_what_has_no_tensor_names_the_field_and_the_document(value: Any) -> None:
    with pytest.raises(DataError) as caught:
        stack([value], field="x", ids=["a"])
    assert (caught.value.field, caught.value.document_id) == ("x", "a")


def test_samples_hold_python_values_lists_and_tensors() -> None:
    key = Key.parse("x")
    assert build(columns(1.5, 2.5), key) == [1.5, 2.5]
    assert build(columns([1, 2], [3, 4]), key) == [[1, 2], [3, 4]]
    assert build(columns("a", None), key) == ["a", None]
    (sample,) = build(columns(stored(np.ones((2, 2), "f4"))), key)
    assert torch.equal(sample, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("key", "signature"),
    [(("x", "y"), "*args"), ({"x": "x", "y": "y"}, "**kwargs"), ((["x"], {"y": "y"}), "*args,**kwargs")],
)
def test_a_sample_goes_into_the_transform_by_its_signature(key: Any, signature: str) -> None:
    rows = decode(bson.encode({"_id": 1, "x": 3, "y": 4}), ["x", "y"])

    def transform(x: int, y: int) -> dict[str, int]:
        return {"difference": x - y}

    batch = SampleBuilder(key=Key.parse(key), transform=transform, signature=signature)(rows).batch
    assert batch["difference"].tolist() == [-1]


def test_singleton_hands_the_sample_over_as_one() -> None:
    rows = decode(bson.encode({"_id": 1, "x": 3, "y": 4}), ["x", "y"])
    builder = SampleBuilder(key=Key.parse(("x", "y")), transform=sum, signature="singleton")
    assert builder(rows).batch.tolist() == [7]


def test_samples_are_stacked_in_their_own_structure() -> None:
    batch = collate([(1.0, {"a": [1, 2]}, "s"), (2.0, {"a": [3, 4]}, "t")])
    assert torch.equal(batch[0], torch.tensor([1.0, 2.0]))
    assert torch.equal(batch[1]["a"], torch.tensor([[1, 2], [3, 4]]))
    assert batch[2] == ["s", "t"]


def test_samples_of_different_structure_name_the_document() -> None:
    with pytest.raises(ShapeError) as caught:
        collate([(1, 2), (1,)], ids=["a", "b"])
    assert caught.value.document_id == "b"


class Pair(NamedTuple):
    image: Any
    label: Any


class Named(dict[str, Any]):
    """A dict with an attribute of its own."""

    origin = "nowhere"


@dataclasses.dataclass
class Output(OrderedDict[str, Any]):
    """As the outputs of transformers are: a dataclass and a dict, each item an attribute too."""

    logits: Any = None

    def __post_init__(self) -> None:
        super().__setitem__("logits", self.logits)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self) -> Any:
        return type(self), (self.logits,)


class Frozen(Mapping[str, Any]):
    """A mapping that cannot be made of a dict alone."""

    def __init__(self, parts: dict[str, Any], version: int) -> None:
        self.parts, self.version = parts, version

    def __getitem__(self, key: str) -> Any:
        return self.parts[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def named(x: Any) -> Named:
    made = Named(a=x)
    made.origin = "here"
    return made


def default(x: Any) -> defaultdict[str, Any]:
    return defaultdict(list, {"a": x})


CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "list": lambda x: [x],
    "tuple": lambda x: (x,),
    "dict": lambda x: {"a": x},
    "namedtuple": lambda x: Pair(x, x),
    "OrderedDict": lambda x: OrderedDict(a=x),
    "defaultdict": default,
    "dict subclass": named,
    "dataclass dict": Output,
    "UserDict": lambda x: UserDict(a=x),
    "nested": lambda x: {"a": (OrderedDict(b=[Pair(x, {"c": x})]),)},
}
each_container = pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)


def kinds(value: Any) -> Any:
    """The types in a structure, at every place."""
    if isinstance(value, Mapping):
        return type(value), {name: kinds(part) for name, part in value.items()}
    return (type(value), [kinds(part) for part in value]) if isinstance(value, list | tuple) else None


def tensors(value: Any) -> list[torch.Tensor]:
    found = list(leaves(value))
    assert found
    return found


@each_container
def test_a_container_is_mapped_and_keeps_its_type(make: Callable[[Any], Any]) -> None:
    value = make(torch.ones(2))
    found = map_tensors(lambda tensor: tensor + 1, value)
    assert kinds(found) == kinds(value)
    assert all(tensor.tolist() == [2, 2] for tensor in tensors(found))
    assert all(tensor.tolist() == [1, 1] for tensor in tensors(value))


@each_container
def test_a_container_is_copied_and_shares_no_memory(make: Callable[[Any], Any]) -> None:
    value = make(torch.ones(2, requires_grad=True))
    found = copy_tensors(value)
    assert kinds(found) == kinds(value)
    for tensor in tensors(found):
        assert not tensor.requires_grad
        tensor += 1
    assert all(tensor.tolist() == [1, 1] for tensor in tensors(value))


@each_container
def test_a_container_is_moved(make: Callable[[Any], Any]) -> None:
    found = to_device(make(torch.ones(2)), torch.device("meta"))
    assert kinds(found) == kinds(make(None))
    assert {tensor.device.type for tensor in tensors(found)} == {"meta"}


@each_container
def test_a_container_is_pinned(make: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor * 3)
    found = pin_memory(make(torch.ones(2)))
    assert kinds(found) == kinds(make(None))
    assert all(tensor.tolist() == [3, 3] for tensor in tensors(found))


@each_container
def test_samples_in_a_container_are_stacked_into_one(make: Callable[[Any], Any]) -> None:
    found = collate([make(torch.tensor([1.0])), make(torch.tensor([2.0]))])
    assert kinds(found) == kinds(make(None))
    assert all(tensor.tolist() == [[1], [2]] for tensor in tensors(found))


@each_container
def test_inputs_in_a_container_are_stacked_and_outputs_taken_apart(make: Callable[[Any], Any]) -> None:
    items = [make(torch.tensor(1.0)), make(torch.tensor(2.0))]
    if "list" not in str(kinds(items[0])):  # a list is one value there
        found = stack_inputs(items)
        assert kinds(found) == kinds(items[0])
        assert all(tensor.tolist() == [1, 2] for tensor in tensors(found))
    apart = unstack(make(torch.tensor([1.0, 2.0])), 2)
    assert [kinds(item) for item in apart] == [kinds(item) for item in items]
    assert [[tensor.item() for tensor in tensors(item)] for item in apart] == [
        [tensor.item() for tensor in tensors(item)] for item in items
    ]


@each_container
def test_the_rows_of_a_container_are_those_of_its_tensors(make: Callable[[Any], Any]) -> None:
    assert count_rows(make(torch.ones(5, 2))) == 5
    assert count_rows(make(torch.tensor(1.0))) == count_rows(make("text")) == 1


def test_what_else_a_container_holds_stays() -> None:
    assert copy_tensors(default(torch.ones(1)))["missing"] == []
    assert copy_tensors(named(torch.ones(1))).origin == "here"
    output = map_tensors(lambda tensor: tensor + 1, Output(torch.ones(1)))
    assert output.logits is output["logits"]
    assert output.logits.tolist() == [2]


@pytest.mark.parametrize("mapping", [Frozen({"a": torch.ones(1)}, 3), MappingProxyType({"a": torch.ones(1)})])
def test_a_mapping_that_cannot_be_rebuilt_becomes_a_dict(mapping: Mapping[str, Any]) -> None:
    found = to_device(mapping, torch.device("cpu"))
    assert type(found) in (dict, MappingProxyType)
    assert found["a"].tolist() == [1]


@pytest.mark.parametrize("items", [[(1.0, 2.0), (1.0,)], [{"a": 1.0}, {"b": 1.0}], [{"a": 1.0}, 2.0]])
def test_inputs_of_different_structure_are_refused(items: list[Any]) -> None:
    with pytest.raises(ShapeError, match="another structure"):
        stack_inputs(items)
