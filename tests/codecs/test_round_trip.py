"""Any plain value, however nested, and any numpy array come back exactly; in a document, to any client as BSON."""

from __future__ import annotations

import datetime
import struct
from typing import Any

import bson
import numpy as np
import pytest
from bson import Decimal128, MaxKey, MinKey, ObjectId, Regex, Timestamp
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tests.helpers import Blobs

from mongotorch.codecs import Codecs, decode_document, encode_document

pytestmark = pytest.mark.property

texts = st.text(max_size=5)
dates = st.one_of(st.datetimes(), st.datetimes(timezones=st.just(datetime.UTC)))
leaves = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.integers(-(10**120), 10**120), st.floats(), texts),
    *(st.binary(max_size=5), dates, st.dates(), st.complex_numbers(), st.frozensets(st.integers(), max_size=3)),
    *(
        st.binary(min_size=12, max_size=12).map(ObjectId),
        st.sampled_from([MinKey(), MaxKey(), Decimal128("-0.10")]),
    ),
    st.builds(Timestamp, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    st.builds(Regex, st.text("ab^$", max_size=3), st.sampled_from([0, 2])),
)
keys = st.one_of(
    *(texts, st.integers(), st.booleans(), st.none(), st.binary(max_size=3), st.tuples(st.integers(), texts)),
    st.sampled_from(["_codec", "_ref", "$set", "a.b", "dtype", "shape", "data", ""]),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
    ),
    max_leaves=12,
)
described = st.one_of(
    *(hnp.datetime64_dtypes(), hnp.timedelta64_dtypes(), hnp.byte_string_dtypes(), hnp.unicode_string_dtypes())
)
numbers = st.one_of(
    *(hnp.boolean_dtypes(), hnp.integer_dtypes(), hnp.unsigned_integer_dtypes()),
    *(hnp.floating_dtypes(), hnp.complex_number_dtypes()),
)
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
records = hnp.array_dtypes(subtype_strategy=hnp.scalar_dtypes(), max_size=3)


def through(value: Any) -> Any:
    """Through BSON and blobs, as through a store."""
    codecs, blobs = Codecs.builtin(), Blobs()
    record = bson.decode(bson.encode({"it": codecs.encode(value, blobs.put)}))["it"]
    return codecs.decode(record, blobs.blob)


def identical(one: Any, two: Any) -> bool:
    """Equal with the same types inside, the same order of keys, and the same bits of floats."""
    if type(one) is not type(two):
        return False
    if isinstance(one, dict):
        pairs = zip(one.items(), two.items(), strict=True)
        return len(one) == len(two) and all(identical(a, b) and identical(c, d) for (a, c), (b, d) in pairs)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(identical, one, two))
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", two)
    if isinstance(one, complex):
        return identical(one.real, two.real) and identical(one.imag, two.imag)
    return bool(one == two)


def same_array(one: np.ndarray[Any, Any], two: Any) -> bool:
    alike = two.dtype == one.dtype.newbyteorder("=") or two.dtype == one.dtype
    return bool(alike and two.shape == one.shape and two.astype(one.dtype).tobytes() == one.tobytes())


@given(value=values)
def test_any_nested_plain_value_comes_back_exactly(value: Any) -> None:
    assert identical(through(value), value)


@given(value=values)
def test_the_same_value_is_always_the_same_record(value: Any) -> None:
    once, twice = Blobs(), Blobs()
    records = [bson.encode({"it": Codecs.builtin().encode(value, blobs.put)}) for blobs in (once, twice)]

    assert records[0] == records[1]
    assert once == twice


@given(array=hnp.arrays(st.one_of(numbers, described, records), shapes))
def test_an_array_of_any_dtype_and_shape_comes_back_exactly(array: np.ndarray[Any, Any]) -> None:
    assert same_array(array, through(array))


@given(array=hnp.arrays(numbers, hnp.array_shapes(min_dims=2, max_dims=3)), step=st.sampled_from([-1, 2]))
def test_a_view_comes_back_as_the_array_that_it_shows(array: np.ndarray[Any, Any], step: int) -> None:
    for view in (array.T, array[::step], array[..., :1], array.swapaxes(0, 1)[::step]):
        assert same_array(view, through(view))


@given(array=hnp.arrays(numbers, shapes.filter(bool)))
def test_numpy_scalars_come_back_as_scalars(array: np.ndarray[Any, Any]) -> None:
    for scalar in array.ravel()[:2]:
        again = through(scalar)
        assert type(again) is type(scalar)
        assert again.tobytes() == scalar.tobytes()


@given(arrays=st.dictionaries(st.sampled_from("abcd"), hnp.arrays(numbers, shapes), max_size=3), name=texts)
def test_the_arrays_of_a_document_come_back_exactly(arrays: dict[str, np.ndarray[Any, Any]], name: str) -> None:
    document = {"_id": 1, "name": name, "nested": {"arrays": list(arrays.values())}, **arrays}

    again = decode_document(bson.decode(bson.encode(encode_document(document))))

    assert list(again) == list(document)
    assert again["name"] == name
    assert all(same_array(array, again[key]) for key, array in arrays.items())
    assert all(map(same_array, arrays.values(), again["nested"]["arrays"]))


plain_documents = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), texts),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text("abc"), inner, max_size=3)),
        max_leaves=8,
    ),
    max_size=4,
)


@given(document=plain_documents)
def test_a_document_without_arrays_is_left_as_it_is(document: dict[str, Any]) -> None:
    assert encode_document(document) == document
    assert decode_document(document) == document
