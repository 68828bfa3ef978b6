"""Chooses the codec of a value: the set of codecs there is, and the default choice among them.

Plain BSON stays plain, so that mongosh can query it; any other value becomes a record that names its codec.
Packages add codecs by the entry point group `mongotorch.codecs`.

Guarantees: tuples, integers beyond 64 bits and dicts whose keys are no field names come back as what they were.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, Self, final

from bson import Decimal128, Int64, MaxKey, MinKey, ObjectId, Regex, Timestamp

from mongotorch.codecs.arrays import ArrayCodec
from mongotorch.codecs.base import Codec, Get, Put
from mongotorch.codecs.names import NameCodec
from mongotorch.codecs.pickles import DillCodec
from mongotorch.codecs.records import CODEC, REFERENCE, RESERVED_NAMES, codec_of, sequence_record
from mongotorch.codecs.values import ValueCodec
from mongotorch.errors import CodecError, MongotorchError

GROUP = "mongotorch.codecs"
_PLAIN = (
    *(type(None), bool, int, float, str, bytes),
    *(ObjectId, Regex, Int64, Decimal128, Timestamp, MinKey, MaxKey),
)
_RESERVED = frozenset({CODEC, REFERENCE})
_INT64 = range(-(2**63), 2**63)


@final
class JsonCodec(Codec):
    """JSON beside the record, on request: readable by anything."""

    name = "json"

    def handles(self, value: Any) -> bool:  # noqa: ARG002
        """False: it is used on request only."""
        return False

    def encode(self, value: Any, put: Put, *, where: str) -> dict[str, Any]:
        """The value as UTF-8 JSON. Raises: CodecError for what JSON would not give back the same."""
        try:
            data = json.dumps(value, allow_nan=False, ensure_ascii=False)
            same = json.loads(data) == value
        except (TypeError, ValueError) as error:
            raise CodecError(f"{where} is not JSON: {error}", field=where) from error
        if not same:
            raise CodecError(f"{where} would not come back the same from JSON", field=where)
        return {"blob": put(data.encode())}

    def decode(self, record: Mapping[str, Any], get: Get) -> Any:
        """The value."""
        return json.loads(get(record["blob"]))


@final
class Codecs:
    """A set of codecs, asked in order for the default choice."""

    def __init__(self, codecs: tuple[Codec, ...]) -> None:
        names = [*RESERVED_NAMES, *(codec.name for codec in codecs)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise CodecError(f"two codecs are called {', '.join(map(repr, twice))}; give each a name of its own")
        self._codecs = {codec.name: codec.bound(self) for codec in codecs}

    @classmethod
    def builtin(cls, *more: Codec) -> Self:
        """The built-in codecs and more; dill is asked last."""
        return cls((NameCodec(), ArrayCodec(), JsonCodec(), ValueCodec(), *more, DillCodec()))

    @classmethod
    def default(cls) -> Self:
        """The built-in codecs, and those that installed packages offer."""
        return cls.builtin(*(entry.load()() for entry in sorted(entry_points(group=GROUP))))

    @property
    def names(self) -> tuple[str, ...]:
        """The names that `artifacts={field: name}` may use."""
        return tuple(self._codecs)

    def encode(self, value: Any, put: Put, *, codec: str | None = None, where: str = "value") -> Any:
        """What is stored for a value: itself where BSON has it, else a record of a codec.

        Args:
            value: Anything.
            put: Takes the bytes that go beside it.
            codec: Name of the codec to use, over the default choice.
            where: Name of the value, for errors.

        Raises:
            CodecError: It cannot be stored, or there is no such codec; nothing was put.
        """
        if type(value) not in (list, tuple, dict):
            return self._encode(value, put, codec, where)
        # One part may be refused after another was encoded: nothing is put until all are.
        pending: list[bytes | memoryview] = []
        try:
            record = self._encode(value, _deferred(pending), codec, where)
        except RecursionError as error:
            raise CodecError(f"{where} contains itself, or is nested too deeply", field=where) from error
        for data in pending:
            put(data)
        return record

    def _encode(self, value: Any, put: Put, codec: str | None, where: str) -> Any:
        if codec is not None:
            return {CODEC: codec, **self._named(codec, where).encode(value, put, where=where)}
        plain, record = _plain(value)
        if plain:
            return record
        if type(value) in (list, tuple, dict) and not any(c.handles(value) for c in self._special):
            return self._container(value, put, where)
        chosen = next(c for c in self._codecs.values() if c.handles(value))
        return {CODEC: chosen.name, **chosen.encode(value, put, where=where)}

    def decode(self, record: Any, get: Get) -> Any:
        """The value of what `encode` gave. Raises: CodecError, PythonVersionError."""
        try:
            return self._decode(record, get)
        except MongotorchError:
            raise
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            raise CodecError(f"not a record that can be read: {type(error).__name__}: {error}") from error

    def _decode(self, record: Any, get: Get) -> Any:
        if isinstance(record, list):
            return [self._decode(part, get) for part in record]
        if not isinstance(record, Mapping):
            # BSON gives integers beyond 32 bits back as a type of its own.
            return int(record) if type(record) is Int64 else record
        name = codec_of(record)
        if name is None:
            return {key: self._decode(part, get) for key, part in record.items()}
        if name == "int":
            return int(record["value"])
        if name == "tuple":
            return tuple(self._decode(part, get) for part in record["items"])
        if name == "dict":
            return {self._decode(key, get): self._decode(part, get) for key, part in record["items"]}
        return self._named(name, "record").decode(record, get)

    @property
    def _special(self) -> list[Codec]:
        return [c for c in self._codecs.values() if not isinstance(c, DillCodec)]

    def _container(self, value: Any, put: Put, where: str) -> Any:
        if isinstance(value, dict):
            if all(_is_field(key) for key in value):
                return {k: self._encode(part, put, None, f"{where}[{k!r}]") for k, part in value.items()}
            pairs = value.items()
            items = [
                [self._encode(k, put, None, where), self._encode(v, put, None, f"{where}[{k!r}]")]
                for k, v in pairs
            ]
            return {CODEC: "dict", "items": items}
        items = [self._encode(part, put, None, f"{where}[{n}]") for n, part in enumerate(value)]
        return sequence_record(value, items)

    def _named(self, name: str, where: str) -> Codec:
        if name not in self._codecs:
            raise CodecError(f"{where}: no codec {name!r}; there are {', '.join(self._codecs)}", field=where)
        return self._codecs[name]


def _is_field(key: Any) -> bool:
    return (
        type(key) is str
        and _is_text(key)
        and not key.startswith("$")
        and not set(key) & {".", "\0"}
        and key not in _RESERVED
    )


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair: Python holds it, BSON does not
        return False
    return True


def _deferred(pending: list[bytes | memoryview]) -> Put:
    def put(data: bytes | memoryview) -> str:
        pending.append(data)
        return hashlib.sha256(data).hexdigest()

    return put


def _plain(value: Any) -> tuple[bool, Any]:
    # Exact types only: a subclass (an enum, a numpy float) would come back as its base.
    kind = type(value)
    if kind is int and value not in _INT64:
        return True, {CODEC: "int", "value": str(value)}
    if kind is str and not _is_text(value):
        return False, value
    # BSON dates are milliseconds without a zone; any other date goes to dill, which keeps it whole.
    date = kind is datetime.datetime and value.tzinfo is None and value.microsecond % 1000 == 0
    return kind in _PLAIN or date, value
