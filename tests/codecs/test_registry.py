"""What a codec stores comes back the same, in this process or another, and says what it is without being decoded.

What must not be stored is refused.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import mongomock
import numpy as np
import pytest
from bson import ObjectId

from mongotorch import Cron
from mongotorch.codecs import (
    FORMAT,
    WRITTEN,
    Codecs,
    Opaque,
    check_format,
    check_python,
    codec_of,
    describe,
    dumps,
    loads,
    reference,
    referenced,
)
from mongotorch.errors import CodecError, FormatError, PythonVersionError, UnsafeClosureError


class Blobs(dict[str, bytes]):
    def put(self, data: bytes | memoryview) -> str:
        name = hashlib.sha256(data).hexdigest()
        self[name] = bytes(data)
        return name

    def get_blob(self, name: str) -> bytes:
        return self[name]


def through(value: Any, **options: Any) -> Any:
    codecs, blobs = Codecs.builtin(), Blobs()
    return codecs.decode(codecs.encode(value, blobs.put, **options), blobs.get_blob)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        10**100,
        -(2**63),
        2**63,
        1.5,
        "text",
        b"\x00",
        ObjectId("656f00000000000000000001"),
        datetime.datetime(2026, 5, 3, 12, 0, 0, 1000),
        datetime.datetime(2026, 5, 3, 12, 0, 0, 1001),
        datetime.datetime(2026, 5, 3, tzinfo=datetime.UTC),
        ("x", ("y", [1, (2,)])),
        {"a": {"b": (1, 2)}},
        {0: "int key", "0": "text key", ("t",): 1},
        {"$set": 1, "a.b": 2, "_codec": 3},
        {1, 2, 3},
    ],
)
def test_a_value_comes_back_with_its_type(value: Any) -> None:
    again = through(value)

    assert again == value
    assert type(again) is type(value)


def test_plain_fields_are_plain_bson() -> None:
    value = {"batch_size": 256, "shuffle": True, "names": ["a"]}

    assert Codecs.builtin().encode(value, Blobs().put) == value


def test_nan_stays_nan() -> None:
    assert math.isnan(through(float("nan")))


def test_what_can_be_imported_is_stored_as_its_name() -> None:
    record = Codecs.builtin().encode(math.sqrt, Blobs().put)

    assert record == {"_codec": "name", "name": "math.sqrt"}
    assert through(math.sqrt) is math.sqrt


def test_a_name_that_is_gone_is_named_in_the_error() -> None:
    with pytest.raises(CodecError, match=r"nowhere\.at_all"):
        Codecs.builtin().decode({"_codec": "name", "name": "nowhere.at_all"}, Blobs().get_blob)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "uint32", "bool", "complex64", ">i4"])
def test_arrays_keep_dtype_and_shape(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)

    again = through(array)

    np.testing.assert_array_equal(again, array)
    assert again.dtype == array.dtype.newbyteorder("=")
    again[0, 0] = 0  # writable


def test_an_unknown_codec_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(CodecError, match="dill"):
        through(1, codec="zip")


def test_json_refuses_what_would_not_come_back() -> None:
    assert through({"a": [1]}, codec="json") == {"a": [1]}
    with pytest.raises(CodecError):
        through((1, 2), codec="json")


def test_a_closure_and_a_lambda_come_back_working() -> None:
    offset = 3

    assert through(lambda x: x + offset)(1) == 4


def unsafe_functions() -> list[tuple[Any, str]]:
    client: Any = mongomock.MongoClient()

    def reads() -> Any:
        return client.db.c.find_one()

    def outer() -> Any:
        return reads()

    return [
        (reads, r"objective\.__closure__\['client'\]"),
        (outer, r"objective\.__closure__\['reads'\]\.__closure__\['client'\]"),
        (functools.partial(print, client.db), r"objective\.args\[0\]"),
        ({"a": [client.db.c]}, r"objective\['a'\]\[0\]"),
        (lambda x, c=client: x, r"objective\.__defaults__\[0\]"),
    ]


@pytest.mark.parametrize(("value", "path"), unsafe_functions())
def test_a_database_client_is_refused_and_the_path_to_it_named(value: Any, path: str) -> None:
    blobs = Blobs()

    with pytest.raises(UnsafeClosureError, match=path):
        Codecs.builtin().encode(value, blobs.put, codec="dill", where="objective")

    assert not blobs


def test_bytecode_of_another_python_is_refused_before_anything_is_read() -> None:
    def never(name: str) -> bytes:
        raise AssertionError(name)

    with pytest.raises(PythonVersionError, match=r"3\.2"):
        Codecs.builtin().decode({"_codec": "dill", "blob": "00", "python": "3.2"}, never)


def test_a_pickle_without_bytecode_is_not_bound_to_a_python() -> None:
    assert dumps({1, 2}, where="value").python is None
    assert dumps(lambda: 1, where="value").python == f"{sys.version_info.major}.{sys.version_info.minor}"
    check_python(None)


def test_objects_kept_outside_come_back_in_their_place() -> None:
    kept: list[Any] = []

    def external(value: Any) -> int | None:
        if not isinstance(value, np.ndarray):
            return None
        kept.append(value)
        return len(kept) - 1

    pickled = dumps({"a": np.zeros(3), "b": 1}, where="value", external=external)

    again = loads(pickled.data, python=pickled.python, external=lambda index: kept[index])
    assert again["a"] is kept[0]


SCRIPT = """
import sys
from mongotorch.codecs import dumps
class Scale:
    def __init__(self, by): self.by = by
    def __call__(self, x): return x * self.by * FACTOR
FACTOR = 2
pickled = dumps(Scale(5), where="model")
sys.stdout.buffer.write(pickled.data)
"""


def test_a_class_of_main_works_in_another_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    data = subprocess.run([sys.executable, str(script)], check=True, capture_output=True).stdout

    assert loads(data, python=None)(3) == 30


def stored(value: Any) -> Any:
    return Codecs.builtin().encode(value, lambda data: "0" * 64)


@pytest.mark.parametrize(
    "value", [None, 1, 2**70, "x", [1, "a"], ("x", ("y", 2)), {"lr": 0.1, "betas": (0.9, 0.99)}]
)
def test_plain_values_and_tuples_are_described_as_they_are(value: Any) -> None:
    assert describe(stored(value)) == value
    assert type(describe(stored(value))) is type(value)


def test_names_and_values_are_described_by_todays_names() -> None:
    assert describe(stored(np.mean)) == "numpy.mean"
    assert describe({"_codec": "name", "name": "mongotorch.run.triggers.cron.Cron"}) == "mongotorch.Cron"
    first = {**stored(Cron("0 3 * * *")), "class": "mongotorch.run.triggers.cron:Cron"}
    described = describe([first])[0]
    assert described["class"] == "mongotorch:Cron"
    assert described["fields"]["expression"] == "0 3 * * *"


def test_what_lies_in_blobs_is_named_and_can_be_told_from_text() -> None:
    described = describe(stored([np.zeros(2), lambda: 0, "<array>"]))
    assert described == ["<array>", "<dill>", "<array>"]
    assert [isinstance(part, Opaque) for part in described] == [True, True, False]


def test_a_reference_is_known_by_its_uuid() -> None:
    record = reference("u", type_id="model", identifier="m")
    assert (referenced(record), codec_of(record)) == ("u", None)
    assert describe(record) == record
    assert referenced({"a": 1}) is referenced([record]) is referenced("u") is None


@pytest.mark.parametrize("record", [{}, {"format": 1}, {"format": FORMAT}, WRITTEN])
def test_what_was_written_so_far_is_read(record: dict[str, Any]) -> None:
    check_format(record, "job")


def test_what_a_newer_release_wrote_is_refused() -> None:
    with pytest.raises(
        FormatError, match=r"job 'a' is of format 3, written by a newer mongotorch.*upgrade"
    ) as caught:
        check_format({"_id": "a", "format": 3}, "job")
    assert caught.value.field == "format"


@pytest.mark.parametrize("written", [0, -1, True, "2", None, 2.0])
def test_what_is_no_number_of_a_format_is_refused(written: Any) -> None:
    with pytest.raises(FormatError, match="no number of a format"):
        check_format({"_id": "a", "format": written}, "job")
