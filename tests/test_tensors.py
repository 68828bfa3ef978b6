from typing import Any

import bson
import numpy as np
import pytest
import torch

from mongotorch.data.decode.decoder import decode
from mongotorch.data.stream.batches import SampleBuilder, build, collate
from mongotorch.data.stream.rows import column_tensor
from mongotorch.errors import DataError, ShapeError
from mongotorch.signature import Key
from mongotorch.tensors import stack


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

    batch = SampleBuilder(key=Key.parse(key), transform=transform, signature=signature)(rows)
    assert batch["difference"].tolist() == [-1]


def test_singleton_hands_the_sample_over_as_one() -> None:
    rows = decode(bson.encode({"_id": 1, "x": 3, "y": 4}), ["x", "y"])
    builder = SampleBuilder(key=Key.parse(("x", "y")), transform=sum, signature="singleton")
    assert builder(rows).tolist() == [7]


def test_samples_are_stacked_in_their_own_structure() -> None:
    batch = collate([(1.0, {"a": [1, 2]}, "s"), (2.0, {"a": [3, 4]}, "t")])
    assert torch.equal(batch[0], torch.tensor([1.0, 2.0]))
    assert torch.equal(batch[1]["a"], torch.tensor([[1, 2], [3, 4]]))
    assert batch[2] == ["s", "t"]


def test_samples_of_different_structure_name_the_document() -> None:
    with pytest.raises(ShapeError) as caught:
        collate([(1, 2), (1,)], ids=["a", "b"])
    assert caught.value.document_id == "b"
