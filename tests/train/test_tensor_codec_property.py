"""Tensors come back bit for bit, whatever their dtype, shape and layout, and share memory exactly as they did."""

from __future__ import annotations

import math
from typing import Any

import bson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers import Blobs
from torch import Tensor, nn

from mongotorch.codecs import Codecs
from mongotorch.train.tensor_codec import TorchCodec

pytestmark = pytest.mark.property

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
    *(
        torch.uint64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.complex128,
    ),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]
dtypes = st.sampled_from(DTYPES)
shapes = st.one_of(
    st.lists(st.integers(0, 4), max_size=4).map(tuple),
    st.lists(st.integers(0, 40), max_size=2).map(tuple),  # large enough for a blob of their own
)


def through(value: Any) -> Any:
    codecs, blobs = Codecs.builtin(TorchCodec()), Blobs()
    record = bson.decode(bson.encode({"it": codecs.encode(value, blobs.put)}))["it"]
    return codecs.decode(record, blobs.blob)


def made(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """A tensor of any bits, NaN among them."""
    draw = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=draw).bool()
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (count * size,), dtype=torch.uint8, generator=draw)
    return raw.view(dtype).reshape(shape)


def bits(tensor: Tensor) -> bytes:
    # Into memory of its own: one element with a stride of two counts as contiguous, and has no bytes to look at.
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes()


def same(one: Tensor, two: Any) -> bool:
    alike = type(two) is type(one) and two.dtype == one.dtype and two.shape == one.shape
    return alike and two.requires_grad == one.requires_grad and bits(two) == bits(one)


seeds = st.integers(0, 2**32)
tensors = st.builds(made, dtypes, shapes, seeds)
complexes = st.builds(made, st.sampled_from([torch.complex64, torch.complex128]), shapes, seeds)


@given(tensor=tensors)
def test_a_tensor_comes_back_bit_for_bit(tensor: Tensor) -> None:
    assert same(tensor, through(tensor))


@given(tensor=tensors, data=st.data())
def test_a_view_comes_back_as_the_tensor_that_it_shows(tensor: Tensor, data: st.DataObject) -> None:
    views = [tensor, tensor.T if tensor.dim() == 2 else tensor.unsqueeze(0), tensor.expand(2, *tensor.shape)]
    if tensor.dim() and tensor.shape[0]:
        start = data.draw(st.integers(0, tensor.shape[0] - 1))
        views += [tensor[start:], tensor[start], tensor[::2]]
    if tensor.is_complex():
        views += [tensor.conj(), tensor.conj().imag]

    for view in views:
        assert same(view, through(view))


@given(tensor=complexes)
def test_a_tensor_and_its_conjugate_come_back_beside_each_other(tensor: Tensor) -> None:
    value = [tensor, tensor.conj(), tensor.conj().imag]

    assert all(map(same, value, through(value)))


@given(tensor=tensors, trainable=st.booleans())
def test_parameters_and_gradients_that_are_wanted_come_back(tensor: Tensor, trainable: bool) -> None:
    trainable = trainable and (tensor.is_floating_point() or tensor.is_complex())
    parameter = nn.Parameter(tensor, requires_grad=trainable)
    plain = tensor.clone().requires_grad_(trainable)

    found = through({"parameter": parameter, "plain": plain})

    assert same(parameter, found["parameter"])
    assert same(plain, found["plain"])


windows = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 5), st.integers(0, 5), st.integers(1, 3)), max_size=5
)


@given(
    sources=st.lists(dtypes, min_size=1, max_size=3),
    windows=windows,
    picks=st.lists(st.integers(0, 30), max_size=8),
)
def test_what_shared_memory_shares_it_again_and_nothing_else_does(
    sources: list[torch.dtype], windows: Any, picks: list[int]
) -> None:
    wholes = [made(dtype, (120,), seed) for seed, dtype in enumerate(sources)]
    views = [
        wholes[n % len(wholes)].as_strided((rows, columns), (columns * step, step), offset)
        for n, (offset, rows, columns, step) in enumerate(windows)
    ]
    pool = [*wholes, *views]
    value = [pool[pick % len(pool)] for pick in picks]  # one tensor more than once, as tied weights are

    found = through({"list": value, "one": wholes[0]})["list"]

    assert all(map(same, value, found))
    for n in range(len(value)):
        for m in range(n):
            assert (found[n] is found[m]) == (value[n] is value[m])
            if value[n] is not value[m] and value[n].numel() and value[m].numel():
                assert _storage(found[n], found[m]) == _storage(value[n], value[m])
                if _storage(value[n], value[m]):
                    apart = value[n].storage_offset() - value[m].storage_offset()
                    assert found[n].storage_offset() - found[m].storage_offset() == apart
                    assert found[n].stride() == value[n].stride()


def _storage(one: Tensor, two: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()


@given(
    size=st.integers(1, 40), tied=st.lists(st.integers(0, 3), min_size=4, max_size=4), seed=st.integers(0, 2**32)
)
def test_a_module_keeps_which_weights_are_tied(size: int, tied: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    net: Any = nn.ModuleList(nn.Linear(size, size) for _ in range(4))
    for layer, other in zip(net, tied, strict=True):
        layer.weight = net[other].weight

    found = through(net)

    assert found.state_dict().keys() == net.state_dict().keys()
    assert all(map(same, net.state_dict().values(), found.state_dict().values()))
    for n in range(4):
        for m in range(n):
            assert (found[n].weight is found[m].weight) == (net[n].weight is net[m].weight)
            assert found[n].bias is not found[m].bias
