"""The built-in codecs pass the suite that codecs inherit."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import mongomock
import numpy as np
import pytest
import torch
from torch import nn

from mongotorch.codecs import Codec
from mongotorch.codecs.arrays import ArrayCodec
from mongotorch.codecs.names import NameCodec
from mongotorch.codecs.pickles import DillCodec
from mongotorch.codecs.registry import JsonCodec
from mongotorch.testing.codecs import CodecSuite
from mongotorch.train.tensor_codec import TorchCodec


class Local:
    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Local) and other.value == self.value

    def __hash__(self) -> int:
        return hash(self.value)


class TestNameCodec(CodecSuite):
    @pytest.fixture
    def codec(self) -> Codec:
        return NameCodec()

    @pytest.fixture
    def values(self) -> Sequence[Any]:
        return [math.sqrt, nn.functional.cross_entropy, nn.Linear, Codec, Codec.encode, dict]

    @pytest.fixture
    def refused(self) -> Sequence[Any]:
        def local() -> None:
            pass

        return [lambda: 1, local, functools.partial(math.sqrt), 3, "math.sqrt"]

    def same(self, value: Any, again: Any) -> bool:
        return again is value


class TestArrayCodec(CodecSuite):
    @pytest.fixture
    def codec(self) -> Codec:
        return ArrayCodec()

    @pytest.fixture
    def values(self) -> Sequence[Any]:
        record = np.array([(1, 2.5)], dtype=[("a", "i2"), ("b", "f8")])
        return [
            *(np.arange(6).reshape(2, 3).astype(dtype) for dtype in ("float16", "float64", "int8", "bool", ">i4")),
            *(np.arange(6).reshape(2, 3).T, np.zeros((0, 4)), np.array(3.5), np.float32(1.5), np.int64(-1)),
            *(np.array(["a", "bcd"]), np.array(["2026-05-03"], dtype="M8[ns]"), np.array([b"x"]), record),
        ]

    @pytest.fixture
    def refused(self) -> Sequence[Any]:
        return [np.array([object()]), np.ma.masked_array([1, 2], [True, False]), [1, 2], 1.5]

    def same(self, value: Any, again: Any) -> bool:
        native = value.dtype.newbyteorder("=")
        return bool(again.dtype == native and again.shape == value.shape and np.array_equal(again, value))


class TestJsonCodec(CodecSuite):
    @pytest.fixture
    def codec(self) -> Codec:
        return JsonCodec()

    @pytest.fixture
    def values(self) -> Sequence[Any]:
        return [None, True, 0, 10**100, -0.5, "\N{SNOWMAN}\0", [], [1, [2]], {}, {"a": {"$b.c": [None]}}]

    @pytest.fixture
    def refused(self) -> Sequence[Any]:
        return [(1, 2), {1: 2}, float("nan"), float("inf"), b"bytes", {1, 2}, object()]


class TestTorchCodec(CodecSuite):
    @pytest.fixture
    def codec(self) -> Codec:
        return TorchCodec()

    @pytest.fixture
    def values(self) -> Sequence[Any]:
        whole = torch.arange(2000.0)
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.5))
        return [
            *(torch.arange(6.0).reshape(2, 3).T, torch.zeros(0, 4), torch.tensor(True), torch.tensor(1 + 2j)),
            *(torch.ones(3, dtype=torch.bfloat16), torch.ones(2, 2, requires_grad=True), nn.Parameter(whole)),
            *([whole, whole[10:20]], {"a": (whole, 1)}, net.state_dict(), net),
        ]

    @pytest.fixture
    def refused(self) -> Sequence[Any]:
        client: Any = mongomock.MongoClient()
        return [[torch.ones(2), (part for part in "ab")], {"a": [client]}]

    def same(self, value: Any, again: Any) -> bool:
        if isinstance(value, nn.Module):
            return repr(again) == repr(value) and self.same(dict(value.state_dict()), dict(again.state_dict()))
        if isinstance(value, dict):
            return list(value) == list(again) and all(self.same(part, again[key]) for key, part in value.items())
        if isinstance(value, list | tuple):
            return type(again) is type(value) and all(map(self.same, value, again))
        if not isinstance(value, torch.Tensor):
            return type(again) is type(value) and bool(again == value)
        alike = type(again) is type(value) and again.dtype == value.dtype and again.shape == value.shape
        return alike and again.requires_grad == value.requires_grad and torch.equal(again, value)


class TestDillCodec(CodecSuite):
    @pytest.fixture
    def codec(self) -> Codec:
        return DillCodec()

    @pytest.fixture
    def values(self) -> Sequence[Any]:
        return [{1, 2, 3}, frozenset("a"), 1 + 2j, range(3), slice(1), Local(3), Ellipsis, np.ma.nomask, [(), {}]]

    @pytest.fixture
    def refused(self) -> Sequence[Any]:
        client: Any = mongomock.MongoClient()
        return [client, [client.db.c], lambda: client, (part for part in "ab")]
