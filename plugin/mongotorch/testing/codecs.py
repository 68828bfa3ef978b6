"""The tests of a codec, for a class to inherit.

Blobs come back as a `bytearray` and records through BSON, as from a database: a codec that passes works there too.
"""

# ruff: noqa: S101 - these are tests

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, cast, final

import bson
import pytest

from mongotorch.codecs import CODEC, REFERENCE, RESERVED_NAMES, Codec, Codecs
from mongotorch.errors import CodecError

RESERVED_KEYS = frozenset({CODEC, REFERENCE})


@final
class Blobs:
    """Blobs in memory, by their SHA-256."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}

    def put(self, data: bytes | memoryview) -> str:
        """Keep a blob; its name."""
        name = hashlib.sha256(data).hexdigest()
        self.kept[name] = bytes(data)
        return name

    def get(self, name: str) -> bytes:
        """A blob as a store gives it: a `bytearray` of its own."""
        return cast("bytes", bytearray(self.kept[name]))


class CodecSuite:
    """The tests of a codec.

    A class that inherits it, called `Test…`, defines the fixtures `codec`, `values` and `refused`, and `same`
    where `==` does not say whether two values are the same.
    """

    @pytest.fixture
    def codec(self) -> Codec:
        """The codec."""
        raise NotImplementedError("define the fixture `codec`")

    @pytest.fixture
    def values(self) -> Sequence[Any]:
        """Values that it stores: each kind, and the smallest and the oddest of it."""
        raise NotImplementedError("define the fixture `values`")

    @pytest.fixture
    def refused(self) -> Sequence[Any]:
        """Values that it cannot store."""
        raise NotImplementedError("define the fixture `refused`")

    def same(self, value: Any, again: Any) -> bool:
        """Whether what came back is what was stored."""
        return type(again) is type(value) and bool(again == value)

    def test_its_name_is_one_that_a_record_can_have(self, codec: Codec) -> None:
        """`artifacts={field: name}` chooses it, and what the registry reads itself is not it."""
        assert codec.name
        assert codec.name.isidentifier()
        assert codec.name not in RESERVED_NAMES

    def test_values_come_back_the_same(self, codec: Codec, values: Sequence[Any]) -> None:
        """Through a record in BSON, and blobs."""
        assert values
        for value in values:
            blobs = Blobs()
            record = bson.decode(bson.encode(codec.encode(value, blobs.put, where="value")))
            again = codec.decode(record, blobs.get)
            assert self.same(value, again), (value, again)

    def test_values_come_back_the_same_through_a_registry(self, codec: Codec, values: Sequence[Any]) -> None:
        """When it is named, whatever the default choice would be."""
        codecs = Codecs((codec,))
        for value in values:
            blobs = Blobs()
            record = bson.decode(bson.encode({"it": codecs.encode(value, blobs.put, codec=codec.name)}))
            assert record["it"]["_codec"] == codec.name
            again = codecs.decode(record["it"], blobs.get)
            assert self.same(value, again), (value, again)

    def test_a_record_leaves_the_keys_of_the_registry_alone(self, codec: Codec, values: Sequence[Any]) -> None:
        """`_codec` and `_ref` are not the codec's."""
        for value in values:
            assert not RESERVED_KEYS & set(codec.encode(value, Blobs().put, where="value")), value

    def test_the_same_value_is_the_same_record_and_the_same_blobs(
        self, codec: Codec, values: Sequence[Any]
    ) -> None:
        """Else content that did not change would become a new version."""
        for value in values:
            once, twice = Blobs(), Blobs()
            records = [codec.encode(value, blobs.put, where="value") for blobs in (once, twice)]
            assert records[0] == records[1], value
            assert once.kept == twice.kept, value

    def test_what_comes_back_is_written_as_what_was_stored(self, codec: Codec, values: Sequence[Any]) -> None:
        """A second way round gives the same again: nothing is lost little by little."""
        for value in values:
            blobs = Blobs()
            again = codec.decode(codec.encode(value, blobs.put, where="value"), blobs.get)
            twice = codec.decode(codec.encode(again, blobs.put, where="value"), blobs.get)
            assert self.same(value, twice), (value, twice)

    def test_what_it_cannot_store_is_refused_before_anything_is_put(
        self, codec: Codec, refused: Sequence[Any]
    ) -> None:
        """With an error of ours."""
        assert refused
        for value in refused:
            blobs = Blobs()
            with pytest.raises(CodecError):
                codec.encode(value, blobs.put, where="value")
            assert not blobs.kept, value
