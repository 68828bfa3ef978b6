"""The codec `value`: frozen dataclasses that say so, and nothing else, whatever a record claims."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from mongotorch import AnyOf, Better, Cron, NewDocuments
from mongotorch.codecs import Codec, Codecs
from mongotorch.codecs.names import ValueCodec
from mongotorch.errors import CodecError
from mongotorch.testing.codecs import Blobs, CodecSuite

HERE = __name__


@dataclasses.dataclass(frozen=True)
class Point:
    __mongotorch_value__: ClassVar[bool] = True

    x: int
    y: Any = 2
    twice: int = dataclasses.field(init=False, default=0)
    tags: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "twice", 2 * self.x)


@dataclasses.dataclass
class Thawed:
    __mongotorch_value__: ClassVar[bool] = True

    x: int = 1


@dataclasses.dataclass(frozen=True)
class Unmarked:
    x: int = 1


@dataclasses.dataclass(frozen=True)
class Denied(Point):
    __mongotorch_value__: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class Lossy:
    __mongotorch_value__: ClassVar[bool] = True

    x: int
    scale: dataclasses.InitVar[int]

    def __post_init__(self, scale: int) -> None:
        object.__setattr__(self, "x", self.x * scale)


class Plain:
    __mongotorch_value__ = True


class TestValueCodec(CodecSuite):
    @pytest.fixture
    def codec(self) -> Codec:
        return ValueCodec().bound(Codecs.builtin())

    @pytest.fixture
    def values(self) -> Sequence[Any]:
        parts = [Point(1), Point(10**30, (1, None)), Point(-1, {"a": Point(3)}, ["t"]), Point(0, {1: 2.5})]
        return [*parts, Better(0.1, 0.95), AnyOf(Cron("0 3 * * *"), NewDocuments(5, max_wait=60))]

    @pytest.fixture
    def refused(self) -> Sequence[Any]:
        local = dataclasses.make_dataclass("local", [("x", int)], frozen=True)
        unstorable = Point(1, [np.ones(3), (part for part in "ab")])
        return [Point, Thawed(), Unmarked(), Denied(1), Lossy(2, 3), Plain(), local(1), 3, None, unstorable]


def test_it_is_the_default_choice_for_such_values_and_plain_to_read() -> None:
    codecs, blobs = Codecs.default(), Blobs()

    record = codecs.encode({"at": Point(1, "north")}, blobs.put)

    assert record == {
        "at": {
            "_codec": "value",
            "class": f"{HERE}:Point",
            "fields": {"x": 1, "y": "north", "tags": []},
        }
    }
    assert codecs.decode(record, blobs.get) == {"at": Point(1, "north")}


def test_what_its_fields_need_beside_them_is_put() -> None:
    codecs, blobs = Codecs.builtin(), Blobs()

    record = codecs.encode(Point(1, np.arange(3)), blobs.put)

    assert record["fields"]["y"]["_codec"] == "array"
    assert codecs.decode(record, blobs.get).y.tolist() == [0, 1, 2]


@pytest.mark.parametrize("value", [Thawed(), Unmarked(), Plain()])
def test_others_go_to_dill_as_ever(value: Any) -> None:
    assert Codecs.builtin().encode(value, Blobs().put)["_codec"] == "dill"


def test_what_the_record_lacks_takes_its_default_and_what_is_computed_is_computed_again() -> None:
    again = Codecs.builtin().decode({"_codec": "value", "class": f"{HERE}:Point", "fields": {"x": 4}}, Blobs().get)

    assert again == Point(4)
    assert again.twice == 8


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("subprocess:Popen", {"args": ["touch", "/tmp/owned"]}, "no class whose values are stored"),
        ("os:system", {"command": "true"}, "no class whose values are stored"),
        ("builtins:eval", {}, "no class whose values are stored"),
        (f"{HERE}:Unmarked", {"x": 1}, "no class whose values are stored"),
        (f"{HERE}:Thawed", {"x": 1}, "no class whose values are stored"),
        (f"{HERE}:Denied", {"x": 1}, "no class whose values are stored"),
        (f"{HERE}:Plain", {}, "no class whose values are stored"),
        (f"{HERE}:HERE", {}, "no class whose values are stored"),
        (f"{HERE}:Missing", {}, "cannot be imported"),
        ("no.such.module:Class", {}, "cannot be imported"),
        ("", {}, "cannot be imported"),
        (f"{HERE}:Point", {"x": 1, "z": 2}, "has no"),
        (f"{HERE}:Point", {"x": 1, "twice": 9}, "has no"),
        (f"{HERE}:Point", {}, "needs 'x'"),
        ("mongotorch.schedule.gates:Better", {"margin": "wide"}, "margin"),
        ("mongotorch.schedule.triggers.time:Cron", {"expression": "never"}, "expression"),
        ("mongotorch.schedule.triggers.combined:AnyOf", {"triggers": ["x"]}, "no trigger"),
    ],
)
def test_a_record_that_lies_makes_nothing(
    name: str, fields: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess.Popen, "__init__", lambda *_, **__: pytest.fail("it was called"))

    with pytest.raises(CodecError, match=message):
        Codecs.builtin().decode({"_codec": "value", "class": name, "fields": fields}, Blobs().get)


def test_a_class_of_the_main_script_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Point, "__module__", "__main__")

    assert not ValueCodec().handles(Point(1))


def test_alone_it_does_not_know_what_stores_the_fields() -> None:
    with pytest.raises(CodecError, match="registry"):
        ValueCodec().encode(Point(1), Blobs().put, where="value")
