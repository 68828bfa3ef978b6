"""Columns hold exactly what `bson.decode` gives, for any documents, whatever way they were decoded."""

from __future__ import annotations

import contextlib
import random
import struct
from datetime import datetime
from typing import Any

import bson
import numpy as np
import pytest
from bson import Code, DBRef, Decimal128, Int64, MaxKey, ObjectId, Regex, Timestamp
from bson.binary import Binary, BinaryVectorDtype
from bson.raw_bson import RawBSONDocument
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mongotorch.data.decode.columns import Column, Columns, build
from mongotorch.data.decode.decoder import decode
from mongotorch.data.decode.ids import id_keys
from mongotorch.data.decode.raw_bson import Reply, found, offsets
from mongotorch.errors import DataError, DtypeError, FieldMissingError

pytestmark = pytest.mark.property

PATHS = ("a", "b", "n.a", "n.m.b", "n")
MISSING = object()
ANY_INPUT = settings(
    max_examples=500, deadline=None, derandomize=False, suppress_health_check=[HealthCheck.too_slow]
)

integers = st.integers(-(2**63), 2**63 - 1)
doubles = st.floats()
dates = st.datetimes(min_value=datetime(1, 1, 1), max_value=datetime(9999, 12, 31))
object_ids = st.binary(min_size=12, max_size=12).map(ObjectId)


def vector(values: list[float]) -> Binary:
    return Binary.from_vector(values, BinaryVectorDtype.FLOAT32)


def stored_array(values: list[float], dtype: str = "float32") -> dict[str, Any]:
    width = {"float32": "<f4", "bfloat16": "<u2", "int16": "<i2", "float64": "<f8", "bool": "?"}[dtype]
    data = np.array(values).astype(width) if dtype != "bfloat16" else np.arange(len(values), dtype=width)
    return {"dtype": dtype, "shape": [1, len(values)], "data": data.tobytes()}


small = st.lists(st.floats(-10, 10, width=32), max_size=12)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    integers,
    integers.map(Int64),
    doubles,
    dates,
    object_ids,
    st.text(max_size=4),
    st.binary(max_size=4),
)
rare = st.one_of(
    st.builds(Binary, st.binary(max_size=8), st.sampled_from([0, 2, 3, 4, 5, 9, 128])),
    st.sampled_from(
        [
            Decimal128("1.50"),
            Timestamp(3, 4),
            Regex("a.b", "i"),
            Code("f()"),
            Code("f()", {"x": 1}),
            MaxKey(),
            DBRef("c", 5),
            {"$ref": "c", "$id": 5, "a": 1},
        ]
    ),
)
arrays = st.one_of(
    small.map(vector),
    st.lists(st.integers(-128, 127), max_size=6).map(lambda v: Binary.from_vector(v, BinaryVectorDtype.INT8)),
    st.builds(stored_array, small, st.sampled_from(["float32", "bfloat16", "int16", "float64", "bool"])),
    st.sampled_from(
        [
            {"dtype": "float32", "shape": [2], "data": b"1234"},
            {"dtype": "object", "shape": [1], "data": b"12345678"},
            {"dtype": 5, "shape": [1], "data": b"1"},
            {"dtype": "int8", "shape": [True], "data": b"1"},
            {"dtype": "int8", "shape": [1], "data": "1"},
            {"dtype": "int8", "shape": [], "data": b"1"},
            {"dtype": "int8", "shape": [1] * 70, "data": b"1"},
            {"dtype": "int8", "shape": [0, 2**62, 2**62], "data": b""},
            {"shape": [1, 1], "dtype": "int8", "data": b"1"},
            {"dtype": "int8", "shape": [1], "data": b"1", "more": 1},
        ]
    ),
)
lists = st.one_of(
    st.lists(doubles, max_size=13),
    st.lists(integers, max_size=13),
    st.lists(st.integers(-5, 5), max_size=120),
    st.lists(st.booleans(), max_size=13),
    st.lists(st.one_of(st.integers(-5, 5), doubles), max_size=13),
    st.lists(st.lists(doubles, min_size=2, max_size=2), max_size=3),
    st.lists(st.one_of(scalars, arrays), max_size=4),
)
values = st.one_of(scalars, rare, arrays, lists)
identities = st.one_of(scalars, rare, st.fixed_dictionaries({"a": scalars}))


def shape_of(pool: list[Any], source: random.Random) -> dict[str, Any]:
    """A document with every path, its values from the pool, sometimes with more or fewer fields."""
    inner = {"b": source.choice(pool), "x": source.choice(pool)}
    document = {
        "a": source.choice(pool),
        "n": {"a": source.choice(pool), "m": inner},
        "b": source.choice(pool),
    }
    if source.random() < 0.3:
        document["z"] = {"": source.choice(pool), "n": [source.choice(pool)]}
    return document


@st.composite
def batches(draw: st.DrawFn, *, complete: bool = False) -> list[dict[str, Any]]:
    """Documents of a few shapes: values of one document exchanged for others of the same form."""
    pool = draw(st.lists(arrays, max_size=3)) + draw(st.lists(values, min_size=3, max_size=6))
    source = random.Random(draw(st.integers(0, 2**32)))
    shapes = [shape_of(pool, source) for _ in range(source.randint(1, 4))]
    if not complete and source.random() < 0.2:
        source.choice(shapes).pop(source.choice(["a", "b", "n"]))
    ids = draw(st.lists(identities, min_size=1, max_size=4))
    found = []
    for _ in range(source.randint(1, 40)):
        document = revalued(source.choice(shapes), source)
        anonymous = not complete and source.random() < 0.02
        found.append(document if anonymous else {"_id": source.choice(ids), **document})
    return found


def revalued(value: Any, source: random.Random) -> Any:
    """Another value of the same form, or now and then of nearly the same."""
    if isinstance(value, dict) and "dtype" in value:
        data = value.get("data")
        return {**value, "data": source.randbytes(len(data))} if type(data) is bytes else value
    if isinstance(value, dict):
        return {key: revalued(item, source) for key, item in value.items()}
    if isinstance(value, list):
        return [revalued(item, source) for item in value]
    if isinstance(value, Binary) and value.subtype == 9:
        return Binary(value[:2] + source.randbytes(len(value[2:])), 9)
    if type(value) is float:
        return source.choice([value, source.random(), float("nan"), -0.0])
    if type(value) is int:
        return source.choice([value, -value]) if abs(value) < 2**31 else value
    if type(value) is bool:
        return source.random() < 0.5
    return source.choice([value, value, value, None, 1.0]) if source.random() < 0.02 else value


def raw(batch: list[dict[str, Any]]) -> bytes:
    return b"".join(map(bson.encode, batch))


def expected_array(value: Any) -> Any:
    """Stored arrays by the letter of the storage format, in other words than the decoder's."""
    if isinstance(value, list):
        return [expected_array(item) for item in value]
    if isinstance(value, Binary) and value.subtype == 9 and len(value) >= 2:
        return expected_vector(value)
    if not isinstance(value, dict):
        return value
    try:
        dtype, shape, data = (value[name] for name in ("dtype", "shape", "data"))
        known = {
            "float32": "<f4",
            "bfloat16": "<u2",
            "int16": "<i2",
            "float64": "<f8",
            "bool": "?",
            "int8": "i1",
        }
        assert len(value) == 3
        assert isinstance(data, bytes)
        assert all(type(size) is not bool and size >= 0 for size in shape)
        flat = np.frombuffer(data, known[dtype])
        return (dtype, flat.reshape(shape))
    except (KeyError, ValueError, AssertionError, TypeError):
        return {key: expected_array(item) for key, item in value.items()}


def expected_vector(value: Binary) -> Any:
    name, width = {0x27: ("float32", "<f4"), 3: ("int8", "i1")}.get(value[0], ("", "V1"))
    if not name or value[1] or (len(value) - 2) % np.dtype(width).itemsize:
        return value
    return (name, np.frombuffer(bytes(value)[2:], width))


def alike(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, tuple):
        name, array = wanted
        assert isinstance(found, np.ndarray)
        native = found.dtype.name == ("uint16" if name == "bfloat16" else name)
        return bool(native and found.shape == array.shape and found.tobytes() == array.tobytes())
    if isinstance(wanted, list):
        return type(found) is list and len(found) == len(wanted) and all(map(alike, found, wanted))
    if isinstance(wanted, dict):
        return (
            type(found) is dict
            and list(found) == list(wanted)
            and all(map(alike, found.values(), wanted.values()))
        )
    if isinstance(wanted, float):
        return type(found) is float and struct.pack("<d", found) == struct.pack("<d", wanted)
    if isinstance(wanted, int):
        return isinstance(found, int) and isinstance(found, bool) == isinstance(wanted, bool) and found == wanted
    return type(found) is type(wanted) and bool(found == wanted)


def looked_up(document: dict[str, Any], path: str) -> Any:
    value: Any = document
    for name in path.split("."):
        value = value.get(name, MISSING) if isinstance(value, dict) else MISSING
    return value


def first_missing(batch: list[dict[str, Any]], paths: tuple[str, ...]) -> tuple[Any, str] | None:
    for document in batch:
        for path in paths:
            if looked_up(document, path) is MISSING:
                return document.get("_id"), path
    return None


def same_form(one: Column, other: Column) -> bool:
    if not len(one):
        return True
    if isinstance(one.data, list) or isinstance(other.data, list):
        return type(one.data) is type(other.data) and one.kind == other.kind
    shapes = one.data.shape == other.data.shape and one.data.dtype == other.data.dtype
    return shapes and (one.kind, one.dtype) == (other.kind, other.dtype)


def check(columns: Columns, batch: list[dict[str, Any]], paths: tuple[str, ...]) -> None:
    assert len(columns) == len(batch)
    for path in paths:
        wanted = [expected_array(looked_up(document, path)) for document in batch]
        assert alike(columns[path].values(), wanted), path
        assert alike([columns[path][row] for row in range(len(batch))], wanted), path
        assert same_form(columns[path], build(columns[path].values())), path
    assert alike(columns.ids.values(), [document.get("_id") for document in batch])


def as_reply(content: bytes) -> bytes:
    """Documents as a server answers with them."""
    documents = [RawBSONDocument(content[start:end]) for start, end in offsets(content)]
    return bson.encode({"cursor": {"id": Int64(0), "firstBatch": documents}})


def any_documents_decode_to_what_bson_gives(batch: list[dict[str, Any]], chosen: set[str], few: int) -> None:
    paths = tuple(sorted(chosen))
    plain = bson.decode_all(raw(batch))
    content: Reply = found(as_reply(raw(batch))).documents if len(batch) % 2 else raw(batch)
    lacking = first_missing(plain, paths)
    if lacking is not None:
        with pytest.raises(FieldMissingError) as caught:
            decode(content, paths, few=few)
        assert caught.value.field == lacking[1]
        assert alike(caught.value.document_id, lacking[0])
        return
    check(decode(content, paths, few=few), plain, paths)


any_documents = given(
    batches(),
    st.sets(st.sampled_from(PATHS), min_size=1),
    st.sampled_from([1, 4, 32]),
)
test_any_documents_decode_to_what_bson_gives = ANY_INPUT(any_documents(any_documents_decode_to_what_bson_gives))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@settings(ANY_INPUT, max_examples=10_000)
@any_documents
def test_ten_thousand_batches_decode_to_what_bson_gives(
    batch: list[dict[str, Any]], chosen: set[str], few: int
) -> None:
    any_documents_decode_to_what_bson_gives(batch, chosen, few)


@ANY_INPUT
@given(batches(complete=True), st.data())
def test_rows_taken_cut_and_joined_are_the_columns_of_those_documents(
    batch: list[dict[str, Any]], data: st.DataObject
) -> None:
    paths = ("a", "n.m.b")
    batch = bson.decode_all(raw(batch))
    last = len(batch) - 1
    rows = data.draw(st.lists(st.integers(0, last), min_size=1, max_size=12))
    cut = data.draw(st.integers(0, last))
    columns = decode(raw(batch), paths, few=1)
    check(columns.take(np.array(rows)), [batch[row] for row in rows], paths)
    check(columns.slice(0, cut), batch[:cut], paths)
    halves = [decode(raw(batch[:cut]), paths), decode(raw(batch[cut:]), paths, few=1)]
    check(Columns.concat(halves), batch, paths)


MAKE: dict[str, Any] = {"float": float, "int64": int, "bool": bool}


def in_dtype(value: Any, dtype: str) -> Any:
    """A value with its numbers in one dtype. Raises: ValueError, OverflowError where one would change."""
    if isinstance(value, list):
        return [in_dtype(item, dtype) for item in value]
    if not isinstance(value, bool | int | float):
        return value
    made = MAKE[dtype](value)
    if made != value and not (dtype == "float" and value != value):
        raise ValueError(value)
    if dtype == "int64" and not -(2**63) <= made < 2**63:
        raise ValueError(value)
    return made


plain = st.one_of(scalars, st.lists(st.one_of(st.integers(-3, 3), doubles, st.booleans()), max_size=4), lists)


def any_values_are_in_the_dtype_of_the_run(values: list[Any], dtype: str) -> None:
    content = raw([{"_id": row, "a": value} for row, value in enumerate(values)])
    wanted: list[Any] = []
    misfit = None
    for row, one in enumerate(bson.decode_all(content)):
        try:
            wanted.append(in_dtype(expected_array(one["a"]), dtype))
        except (ValueError, OverflowError):
            misfit = row
            break
    if misfit is None:
        columns = decode(content, ("a",), few=1).typed({"a": dtype})
        column = columns["a"]
        assert alike(column.values(), wanted)
        assert not column.plain or column.dtype == np.asarray(column.data).dtype.name
        return
    with pytest.raises(DtypeError) as caught:
        decode(content, ("a",), few=1).typed({"a": dtype})
    assert (caught.value.document_id, caught.value.field) == (misfit, "a")


any_values = given(
    st.lists(st.one_of(st.integers(-3, 3), st.sampled_from([0.5, 1.0, True, 2.0])), min_size=1, max_size=12)
    | st.lists(plain, min_size=1, max_size=12),
    st.sampled_from(["float", "int64", "bool"]),
)
test_any_values_are_in_the_dtype_of_the_run = ANY_INPUT(any_values(any_values_are_in_the_dtype_of_the_run))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@settings(ANY_INPUT, max_examples=10_000)
@any_values
def test_ten_thousand_values_are_in_the_dtype_of_the_run(values: list[Any], dtype: str) -> None:
    any_values_are_in_the_dtype_of_the_run(values, dtype)


@ANY_INPUT
@given(batches(), st.integers(0, 2**32))
def test_documents_that_were_tampered_with_are_read_or_refused(batch: list[dict[str, Any]], seed: int) -> None:
    source = random.Random(seed)
    for is_reply in (False, True):
        content = bytearray(as_reply(raw(batch * 3)) if is_reply else raw(batch * 3))
        for _ in range(source.randint(1, 6)):
            at = source.randrange(len(content))
            changed = source.choice(
                [b"\0", b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\x05\0\0\0", source.randbytes(4)]
            )
            content[at : at + len(changed)] = changed[: len(content) - at]
        with contextlib.suppress(DataError):  # and its subclass for a missing field
            decode(found(bytes(content)).documents if is_reply else bytes(content), PATHS)


@ANY_INPUT
@given(st.lists(identities, min_size=1, max_size=20))
def test_id_keys_do_not_depend_on_the_company_or_the_way_of_decoding(ids: list[Any]) -> None:
    together = id_keys(decode(raw([{"_id": value} for value in ids]), (), few=1).ids)
    alone = [id_keys(decode(raw([{"_id": value}]), ()).ids)[0] for value in ids]
    assert together.dtype == np.uint64
    assert together.tolist() == alone


@ANY_INPUT
@given(st.one_of(integers, st.integers(-(2**53), 2**53)))
def test_ids_that_are_equal_numbers_have_equal_keys(number: int) -> None:
    same: list[Any] = [number, Int64(number), Decimal128(str(number))]
    if int(float(number)) == number and -(2**63) <= number < 2**63:
        same.append(float(number))
    keys = [id_keys(decode(raw([{"_id": form}]), ()).ids)[0] for form in same]
    inside = [id_keys(decode(raw([{"_id": {"k": [form]}}]), ()).ids)[0] for form in same]
    assert len(set(keys)) == 1
    assert len(set(inside)) == 1
    assert keys[0] != inside[0]
