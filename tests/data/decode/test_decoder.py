"""Raw BSON to columns: forms, the fast path, errors, keys of ids."""

from __future__ import annotations

import contextlib
import pickle
import random
from datetime import datetime
from typing import Any, NoReturn

import bson
import numpy as np
import pytest
import torch
from bson import ObjectId
from bson.binary import Binary, BinaryVectorDtype

from mongotorch.data.decode.columns import Columns
from mongotorch.data.decode.decoder import decode
from mongotorch.data.decode.ids import id_keys
from mongotorch.data.decode.raw_bson import Octets, Positions
from mongotorch.data.stream.batches import column_tensor, gathered
from mongotorch.errors import DataError, FieldMissingError


def raw(documents: list[dict[str, Any]]) -> bytes:
    return b"".join(map(bson.encode, documents))


def document(row: int) -> dict[str, Any]:
    image = np.full((2, 3), row, "<i2")
    return {
        "_id": ObjectId(f"{row:024x}"),
        "double": row / 2,
        "int": row,
        "long": bson.Int64(row),
        "flag": row % 2 == 0,
        "at": datetime(2020, 1, 1 + row % 28),
        "other": ObjectId(f"{row + 7:024x}"),
        "none": None,
        "deep": {"down": {"list": [row + digit / 8 for digit in range(1200)]}, "ints": [row, 2, 3]},
        "vector": Binary.from_vector([float(row), 1.5], BinaryVectorDtype.FLOAT32),
        "bytes": Binary.from_vector([row % 100, -1], BinaryVectorDtype.INT8),
        "image": {"dtype": "int16", "shape": [2, 3], "data": image.tobytes()},
        "half": {"dtype": "bfloat16", "shape": [2], "data": image.tobytes()[:4]},
    }


GOLDEN = [
    "0x52e5ac167ed54c3e",
    "0x52e5ac167ed54c3e",
    "0x4d0959c3deea86fd",
    "0xef62a48b331cfbd",
    "0xd498a1a0a4958904",
    "0x578bfa4c4f1b0c99",
    "0x52a23caf71cf33a",
    "0x97eb0270559f760f",
    "0x7f77f3cb41de18f0",
]
PATHS = (
    *("double", "int", "long", "flag", "at", "other", "none", "deep.down.list", "deep.ints"),
    *("vector", "bytes", "image", "half"),
)


def refuse(*_: Any) -> NoReturn:
    raise AssertionError("bson was asked to decode whole documents")


def test_uniform_documents_are_read_without_decoding_any(monkeypatch: pytest.MonkeyPatch) -> None:
    content = raw([document(row) for row in range(100)])
    monkeypatch.setattr(bson, "decode_all", refuse)
    columns = decode(content, PATHS)
    forms = {path: (columns[path].kind, columns[path].dtype, np.shape(columns.column(path))) for path in PATHS}
    assert forms == {
        "double": ("number", "float64", (100,)),
        "int": ("number", "int64", (100,)),
        "long": ("number", "int64", (100,)),
        "flag": ("number", "bool", (100,)),
        "at": ("date", "int64", (100,)),
        "other": ("oid", "uint8", (100,)),
        "none": ("object", "object", (100,)),
        "deep.down.list": ("number", "float64", (100, 1200)),
        "deep.ints": ("number", "int64", (100, 3)),
        "vector": ("array", "float32", (100, 2)),
        "bytes": ("array", "int8", (100, 2)),
        "image": ("array", "int16", (100, 2, 3)),
        "half": ("array", "bfloat16", (100, 2)),
    }


@pytest.mark.parametrize("smallest_group", [1, 1000])
def test_every_type_has_the_value_that_was_stored(smallest_group: int) -> None:
    documents = [document(row) for row in range(40)]
    columns = decode(raw(documents), PATHS, few=smallest_group)
    for path in ("double", "int", "long", "flag", "at", "other", "none"):
        assert columns[path].values() == [one[path] for one in documents]
    assert columns["deep.down.list"].values() == [one["deep"]["down"]["list"] for one in documents]
    assert np.array_equal(columns.column("image")[3], np.full((2, 3), 3))
    assert np.array_equal(columns.column("vector")[3], np.array([3, 1.5], np.float32))
    assert columns.plain("double")
    assert not columns.plain("image")
    assert list(columns.ids) == [one["_id"] for one in documents]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([0.5, 1.5], [bson.Int64(3), bson.Int64(4)]),
        ([0.5, 1.5], [0.5, bson.Int64(4)]),
        (Binary(b"\x27\0abcd", 9), Binary(b"\x03\0abcd", 9)),
        (Binary(b"\x27\0abcd", 9), Binary(b"\x27\0abcd", 5)),
        (0.5, bson.Int64(5)),
        (datetime(2020, 1, 1), bson.Int64(5)),
        *[
            ({"dtype": "float32", "shape": [2, 1], "data": b"12345678"}, changed)
            for changed in (
                {"dtype": "float64", "shape": [1, 1], "data": b"12345678"},
                {"dtype": "float32", "shape": [1, 2], "data": b"12345678"},
                {"dtype": "float32", "shape": [3, 1], "data": b"12345678"},
                {"dtype": "float32", "shapo": [2, 1], "data": b"12345678"},
            )
        ],
    ],
)
def test_documents_of_one_length_and_another_structure_are_told_apart(one: Any, other: Any) -> None:
    pair = [bson.encode({"_id": 1, "x": one}), bson.encode({"_id": 2, "x": other})]
    assert len(pair[0]) == len(pair[1])
    together = decode(b"".join(pair * 3), ["x"], few=1)["x"].values()
    alone = [decode(content, ["x"])["x"][0] for content in pair * 3]
    assert list(map(repr, together)) == list(map(repr, alone))


def test_numeric_columns_own_writable_memory() -> None:
    columns = decode(raw([document(row) for row in range(40)]), PATHS)
    arrays = [columns.column(path) for path in PATHS]
    assert all(array.flags.writeable for array in arrays if isinstance(array, np.ndarray))


def test_integers_among_doubles_keep_their_type_and_have_a_numeric_form() -> None:
    columns = decode(raw([{"_id": 1, "x": [1, 0.5]}, {"_id": 2, "x": [0.25, 2.0]}]), ["x"])
    assert columns.column("x") == [[1, 0.5], [0.25, 2.0]]
    numbers = columns["x"].numbers()
    assert numbers is not None
    assert numbers.dtype == np.float64
    assert columns.slice(1, 2)["x"].kind == "number"


def test_lists_of_different_lengths_are_a_list() -> None:
    columns = decode(raw([{"_id": 1, "x": [1.0]}, {"_id": 2, "x": [1.0, 2.0]}]), ["x"])
    assert columns.column("x") == [[1.0], [1.0, 2.0]]
    assert columns["x"].numbers() is None


LENGTHS = [0, 1, 9, 10, 11, 15, 16, 99, 100, 101, 999, 1000, 1001]


@pytest.mark.parametrize("longest", [16, 101, 1001])
@pytest.mark.parametrize("number", [float, int, bson.Int64, bool])
def test_lists_of_one_type_and_any_lengths_are_read_without_decoding_any(
    longest: int, number: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [length for length in LENGTHS if length <= longest] * 3 + [5] * 40
    random.Random(0).shuffle(lengths)
    values = [[number((row + n) % 3) for n in range(length)] for row, length in enumerate(lengths)]
    content = raw([{"_id": row, "x": value} for row, value in enumerate(values)])
    monkeypatch.setattr(bson, "decode_all", refuse)
    column = decode(content, ["x"])["x"]
    assert column.kind == "ragged"
    assert column.values() == values


@pytest.mark.parametrize("lengths", [[3, 12, 7, 9, 4, 12], [2, 300, 4, 5, 3, 40]])
@pytest.mark.parametrize("wrong", ["name", "type", "end", "bool"])
def test_a_list_that_only_has_the_length_of_such_a_list_is_read_as_bson_reads_it(
    lengths: list[int], wrong: str
) -> None:
    number = float if wrong != "bool" else bool
    documents = [{"_id": row, "x": [number(n % 2) for n in range(length)]} for row, length in enumerate(lengths)]
    parts = [bytearray(bson.encode(document)) for document in documents]
    old, new = {
        "name": (b"\x011\0", b"\x017\0"),
        "type": (b"\x011\0", b"\x091\0"),  # a date of as many bytes
        "end": (b"\0\0", b"\1\0"),  # of the list, before that of the document
        "bool": (b"\x081\0\1", b"\x081\0\2"),
    }[wrong]
    start = parts[1].rindex(old)
    parts[1][start : start + len(new)] = new
    content = b"".join(map(bytes, parts))
    try:
        expected = [document["x"] for document in bson.decode_all(content)]
    except bson.errors.BSONError:
        with pytest.raises(DataError):
            decode(content, ["x"], few=0)
        return
    assert decode(content, ["x"], few=0)["x"].values() == expected


@pytest.mark.parametrize("count", [1, 50])
def test_a_missing_field_names_the_first_document_that_lacks_it(count: int) -> None:
    good = [{"_id": row, "n": {"x": 1}} for row in range(count)]
    bad: list[dict[str, Any]] = [{"_id": "late", "n": {}}, {"_id": "later", "n": 5}]
    with pytest.raises(FieldMissingError) as caught:
        decode(raw(good + bad), ["n.x"])
    assert caught.value.document_id == "late"
    assert caught.value.field == "n.x"
    assert "'late'" in str(caught.value)


@pytest.mark.parametrize(("path", "value"), [("items.p", [{"p": 1}, {"p": 2}]), ("items.0", [1, 2])])
@pytest.mark.parametrize("count", [1, 20])
def test_a_path_into_a_list_is_refused_with_what_a_path_may_be(path: str, value: Any, count: int) -> None:
    with pytest.raises(FieldMissingError, match="'items' is a list, and a path does not reach into lists"):
        decode(raw([{"_id": n, "items": value} for n in range(count)]), [path])


def test_empty_lists_among_lists_that_begin_with_a_boolean_are_empty_lists() -> None:
    values: list[Any] = [[], [True, None], [], [], [False, 0.5], []] * 3
    assert decode(raw([{"_id": n, "x": value} for n, value in enumerate(values)]), ["x"])["x"].values() == values


def test_a_name_with_a_dot_is_not_a_path() -> None:
    with pytest.raises(FieldMissingError):
        decode(raw([{"_id": 1, "a.b": 1}] * 10), ["a.b"])


def test_documents_of_optional_fields_and_of_several_orders_are_read_without_decoding_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = random.Random(0)
    documents: list[dict[str, Any]] = []
    for row in range(400):
        found = {f"f{n}": draw.choice([n, n / 3, bson.Int64(n)]) for n in range(10) if draw.random() < 0.5}
        ends = [("y", row), ("x", row / 2)]
        documents.append({"_id": row, **found, **dict(ends if row % 2 else ends[::-1])})
    content = raw(documents)
    monkeypatch.setattr(bson, "decode_all", refuse)
    columns = decode(content, ["x", "y"])
    assert columns.column("y").tolist() == list(range(400))  # type: ignore[union-attr]
    assert columns["x"].values() == [row / 2 for row in range(400)]


def test_numbers_of_mixed_types_are_read_without_decoding_any(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)

    def number() -> Any:
        return draw.choice([draw.randrange(9), draw.random(), bson.Int64(draw.randrange(2**50))])

    def lists() -> dict[str, Any]:
        many = draw.randrange(30)
        return {
            "one": number(),
            "same": [number() for _ in range(12)],
            "ragged": [number() for _ in range(many)],
            "integers": list(range(many)),
            "deep": [[number() for _ in range(3)] for _ in range(4)],
        }

    documents = [{"_id": n, **lists(), "y": n} for n in range(100)]
    content = raw(documents)
    monkeypatch.setattr(bson, "decode_all", refuse)
    columns = decode(content, ["one", "same", "integers", "deep", "y"])
    for path in columns.paths:
        assert repr(columns[path].values()) == repr([one[path] for one in documents]), path
    kinds = {path: columns[path].kind for path in columns.paths}
    assert kinds == {"one": "number", "same": "number", "integers": "ragged", "deep": "number", "y": "number"}
    assert columns["one"].array() is None
    assert columns["one"].numbers() is not None


def test_integers_that_a_double_does_not_hold_stay_exact_among_doubles() -> None:
    values: list[Any] = [0.5, bson.Int64(2**53 + 1), 7]
    columns = decode(raw([{"_id": n, "x": values[n % 3], "v": values} for n in range(30)]), ["x", "v"])
    assert columns["x"].values() == values * 10
    assert columns["v"].values() == [values] * 30


def test_large_integers_of_one_field_stay_exact_beside_fields_of_mixed_numbers() -> None:
    numbers = [{"a": bson.Int64(2**60 + n), "b": n / 2, "c": n if n % 2 else n / 4} for n in range(40)]
    columns = decode(raw([{"_id": n, **row} for n, row in enumerate(numbers)]), ["a", "b", "c"])
    for path in columns.paths:
        assert columns[path].values() == [row[path] for row in numbers]
        assert columns[path].kind == "number"


def test_of_two_fields_of_one_name_the_last_counts_as_in_bson() -> None:
    twice = b"\x10a\x00\x01\x00\x00\x00" + b"\x10a\x00\x02\x00\x00\x00"
    content = (len(twice) + 5).to_bytes(4, "little") + twice + b"\x00"
    assert decode(content * 3, ["a"], few=1).column("a").tolist() == [2, 2, 2]  # type: ignore[union-attr]
    assert bson.decode(content) == {"a": 2}


@pytest.mark.parametrize("content", [b"\x05\x00\x00\x00", b"\x01\x00\x00\x00\x00", b"\x06\x00\x00\x00\x07\x00"])
def test_bytes_that_are_not_documents_are_refused(content: bytes) -> None:
    with pytest.raises(DataError):
        decode(content, ["x"])


def test_a_date_beyond_python_is_a_data_error() -> None:
    far = bson.encode({"_id": 1, "x": bson.DatetimeMS(2**60)})
    for smallest in (1, 32):
        with pytest.raises(DataError):
            decode(far * 2, ["x"], few=smallest)


@pytest.mark.parametrize(
    "ids",
    [
        [1, 2],
        [0.5, 1.5],
        [True, False],
        ["a", "b"],
        [ObjectId("0" * 24), ObjectId("1" * 24)],
        [b"a", b"b"],
        [datetime(2026, 1, 1), datetime(2027, 1, 1)],
        [Binary(b"a" * 16, 4), Binary(b"b" * 16, 4)],
        [{"a": 1}, {"a": 2}],
        [[1], [2]],
        [1, "a"],
        [None],
    ],
    ids=lambda ids: " ".join(type(one).__name__ for one in ids),
)
def test_the_ids_of_no_rows_of_a_range_are_no_keys(ids: list[Any]) -> None:
    columns = decode(raw([{"_id": value} for value in ids]), ())
    for none in (columns.slice(1, 1), columns.take(np.empty(0, np.intp))):
        assert id_keys(none.ids).tolist() == []
    assert len(id_keys(columns.ids)) == len(ids)


def test_no_documents_are_columns_without_rows() -> None:
    columns = decode(b"", ["x"])
    assert len(columns) == 0
    assert columns.column("x") == []
    assert id_keys(columns.ids).shape == (0,)


def test_columns_of_other_paths_do_not_join() -> None:
    one = raw([{"_id": 1, "x": 1, "y": 2}])
    with pytest.raises(ValueError, match="same paths"):
        Columns.concat([decode(one, ["x"]), decode(one, ["y"])])


def test_columns_cross_to_another_process_whole() -> None:
    columns = decode([raw([document(1)]), raw([document(2)])], PATHS)
    crossed = pickle.loads(pickle.dumps(columns))
    assert crossed["deep.ints"].values() == columns["deep.ints"].values()
    assert id_keys(crossed.ids).tolist() == id_keys(columns.ids).tolist()
    assert crossed.nbytes == columns.nbytes


def test_bytes_held_count_arrays_exactly_and_lists_by_estimate() -> None:
    columns = decode(raw([{"_id": row, "x": [0.5] * 4, "t": "a" * 1000} for row in range(64)]), ["x", "t"])
    assert columns["x"].nbytes == 64 * 4 * 8
    assert columns["t"].nbytes > 64_000


def test_id_keys_are_the_same_for_ever() -> None:
    ids: list[Any] = [5, 5.0, 0.5, "five", ObjectId("0" * 24), b"five", None, {"a": 5}, datetime(2020, 1, 1)]
    keys = id_keys(decode(raw([{"_id": one} for one in ids]), ()).ids)
    assert keys[0] == keys[1]
    assert len(set(keys.tolist())) == len(ids) - 1
    assert [hex(key) for key in keys.tolist()] == GOLDEN


def test_arrays_are_what_the_codec_of_documents_gives() -> None:
    codecs = pytest.importorskip("mongotorch.codecs")
    stored = [document(row) for row in range(40)]
    columns = decode(raw(stored), ("vector", "bytes", "image"))
    for row, one in enumerate(stored):
        wanted = {path: one[path] for path in columns.paths}
        decoded = codecs.decode_document(bson.decode(bson.encode(wanted)))
        for path in columns.paths:
            found = columns[path][row]
            assert (found.dtype, found.shape) == (decoded[path].dtype, decoded[path].shape)
            assert np.array_equal(found, decoded[path])


@pytest.mark.parametrize("rows", [1, 40])
def test_an_array_that_is_most_of_its_documents_is_not_copied_and_cannot_be_written(rows: int) -> None:
    stored = [np.arange(64, dtype=np.float32) + row for row in range(rows)]
    vectors = [Binary.from_vector(values.tolist(), BinaryVectorDtype.FLOAT32) for values in stored]
    content = b"".join(bson.encode({"_id": n, "v": vector}) for n, vector in enumerate(vectors))
    column = decode(content, ["v"], few=1)["v"]
    assert isinstance(column.data, np.ndarray)
    assert np.shares_memory(column.data, np.frombuffer(content, np.uint8))
    assert not column.data.flags.writeable
    tensor = column_tensor(decode(content, ["v"], few=1), "v")
    assert tensor is not None
    tensor += 1  # its own memory
    kept = decode(content, ["v"], few=1).owned()["v"]
    assert not np.shares_memory(np.asarray(kept.data), np.frombuffer(content, np.uint8))
    assert np.array_equal(np.asarray(kept.data), column.data)
    assert torch.equal(tensor, torch.from_numpy(np.stack(stored)) + 1)


def test_a_small_array_does_not_keep_its_documents() -> None:
    vector = Binary.from_vector([1.0, 2.0], BinaryVectorDtype.FLOAT32)
    content = b"".join(bson.encode({"_id": n, "v": vector, "text": "x" * 200}) for n in range(40))
    column = decode(content, ["v"])["v"]
    assert isinstance(column.data, np.ndarray)
    assert not np.shares_memory(column.data, np.frombuffer(content, np.uint8))


@pytest.mark.parametrize("path", ["vector", "bytes", "image", "half", "double", "flag", "deep.down.list"])
def test_rows_go_to_their_places_from_blocks_of_any_size(path: str) -> None:
    documents = [{"_id": row, path.partition(".")[0]: document(row)[path.partition(".")[0]]} for row in range(60)]
    blocks = [decode(raw(documents[a:b]), [path]) for a, b in [(0, 1), (1, 41), (41, 60)]]
    order = np.random.default_rng(0).permutation(60)
    whole = column_tensor(decode(raw(documents), [path]), path)
    rows = gathered(blocks, order).tensor(path, 0, 60)
    assert whole is not None
    assert rows is not None
    assert rows.dtype == whole.dtype
    assert torch.equal(rows, whole[torch.from_numpy(order)])


SHAPES: dict[str, Any] = {
    "lists in lists": lambda row: [[row / 7, 1.5], [2.5, row / 3]],
    "lists of any length": lambda row: [[float(at)] * (at % 3) for at in range(row % 5 + 1)],
    "vectors": lambda row: Binary.from_vector([float(row), 1.5], BinaryVectorDtype.FLOAT32),
    "fields in fields": lambda row: {"text": "x" * (row % 3), "down": {"here": row}},
    "texts in lists": lambda row: ["a" * (row % 4), "b"],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_whichever_length_in_a_document_is_damaged_it_is_read_or_refused(shape: str) -> None:
    documents = [bson.encode({"_id": row, "b": SHAPES[shape](row)}) for row in range(120)]
    begin = sum(map(len, documents[:60]))
    for at in range(begin, begin + len(documents[60]) - 4):
        for length in (-(2**31), -1, 5, 2**30, 2**31 - 1):
            content = bytearray(b"".join(documents))
            content[at : at + 4] = length.to_bytes(4, "little", signed=True)
            with contextlib.suppress(DataError):
                decode(bytes(content), ("b",))


def test_bytes_that_are_read_outside_of_the_documents_are_zeros() -> None:
    octets = Octets(bytes(range(1, 9)))
    at = np.array([2, -100, 6, 100], np.int64)
    found = octets.rows(Positions(4, 0, base=at), 4)
    assert found.tolist() == [[3, 4, 5, 6], [0] * 4, [7, 8, 0, 0], [0] * 4]
