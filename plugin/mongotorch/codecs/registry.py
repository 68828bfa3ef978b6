"""Chooses the codec of a value, and defines what a stored record looks like.

A field of a component is stored as plain BSON, which mongosh can query; as a record `{"_codec": name, ...}` that a
codec reads; or as a reference `{"_ref": uuid, "type_id", "identifier"}` to another component. Lists and dicts hold
such parts. Packages add codecs by the entry point group `mongotorch.codecs`.

Every document that mongotorch writes has the number of its format in `format`; one without it was written by the
first releases and is of format 1. This release reads formats 1 and 2 and writes 2.

`NewBlobs` is a `put` that stores nothing yet.

Guarantees: tuples, integers beyond 64 bits and dicts whose keys are no field names come back as what they were.
What a record says of itself (`codec_of`, `referenced`, `describe`) is read without decoding it. A blob is hashed
once, when it is named; where another thread could change its memory afterwards it also gets checksums of what was
hashed, so that other bytes are never stored under its name.
"""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final, Self, final

from bson import Decimal128, Int64, MaxKey, MinKey, ObjectId, Regex, Timestamp

from mongotorch.codecs.arrays import ArrayCodec
from mongotorch.codecs.base import Codec, Get, Put
from mongotorch.codecs.names import NameCodec, ValueCodec, current_name
from mongotorch.codecs.pickles import DillCodec
from mongotorch.errors import CodecError, FormatError, MongotorchError

CODEC: Final = "_codec"
"""The key that names the codec of a record."""
REFERENCE: Final = "_ref"
"""The key that holds the uuid in a reference."""
RESERVED_NAMES: Final = frozenset({"dict", "int", "query", "tuple"})
"""Records that no codec reads, but the registry or a component itself."""

FORMAT: Final = 2
"""The format that this release writes, and the newest that it reads."""
FORMAT_FIELD: Final = "format"
WRITTEN: Final = {FORMAT_FIELD: FORMAT}
"""What a record holds of its format."""
READABLE: Final = {FORMAT_FIELD: {"$not": {"$gt": FORMAT}}}
"""The filter for records that this release can read."""
NEWER: Final = {FORMAT_FIELD: {"$gt": FORMAT}}
"""The filter for records that it cannot read."""

PART_BYTES: Final = 2**20
"""So many bytes of a blob have a checksum together."""

GROUP = "mongotorch.codecs"
_PLAIN = (
    *(type(None), bool, int, float, str, bytes),
    *(ObjectId, Regex, Int64, Decimal128, Timestamp, MinKey, MaxKey),
)
_RESERVED = frozenset({CODEC, REFERENCE})
_INT64 = range(-(2**63), 2**63)
_MOST_DIGITS = 19  # of a number of 64 bits


@final
class FileBytes:
    """The bytes of a file, of which a slice is read when it is taken, so that they are never in memory as a whole.

    Args:
        path: The file, which is complete. It is held open, so that it may be removed meanwhile.

    Attributes:
        nbytes: How many there are.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self.nbytes = os.fstat(self._file.fileno()).st_size

    def __getitem__(self, part: slice) -> bytes:
        start, end, _ = part.indices(self.nbytes)
        return os.pread(self._file.fileno(), end - start, start)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@final
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class NamedBlob:
    """Bytes that are going to be stored, hashed already.

    Attributes:
        name: The SHA-256 in hex.
        data: The bytes; they may be the memory of a tensor, or a file.
        checksums: The CRC-32 of each `PART_BYTES` of them when they were hashed; None where nothing can change
            them.
    """

    name: str
    data: memoryview | FileBytes
    checksums: tuple[int, ...] | None = dataclasses.field(default=None, repr=False)

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview | FileBytes) -> Self:
        """Name bytes. What can be written to is hashed from a copy of each part, and that copy is checksummed."""
        if isinstance(data, FileBytes):
            return cls._of_parts(data)
        view = memoryview(data).cast("B")
        if view.readonly:
            return cls(name=hashlib.sha256(view).hexdigest(), data=view)
        digest, checksums = hashlib.sha256(), []
        copy = memoryview(bytearray(min(PART_BYTES, view.nbytes)))
        for start in range(0, view.nbytes, PART_BYTES):
            part = copy[: min(PART_BYTES, view.nbytes - start)]
            part[:] = view[start : start + PART_BYTES]
            digest.update(part)
            checksums.append(zlib.crc32(part))
        return cls(name=digest.hexdigest(), data=view, checksums=tuple(checksums))

    @classmethod
    def _of_parts(cls, data: FileBytes) -> Self:
        digest, checksums = hashlib.sha256(), []
        for start in range(0, data.nbytes, PART_BYTES):
            part = data[start : start + PART_BYTES]
            digest.update(part)
            checksums.append(zlib.crc32(part))
        return cls(name=digest.hexdigest(), data=data, checksums=tuple(checksums))

    def is_same(self, number: int, part: bytes) -> bool:
        """Whether a part, a copy of those `PART_BYTES` of the data, is still what was hashed."""
        return self.checksums is None or zlib.crc32(part) == self.checksums[number]


@final
class NewBlobs:
    """A `put` that names blobs and keeps them until somebody stores them.

    Args:
        known: That of an earlier one: by address and length, memory that is not hashed again.

    Attributes:
        blobs: By name.
        known: The same, with what was named here.
    """

    def __init__(self, known: dict[tuple[int, int], NamedBlob] | None = None) -> None:
        self.blobs: dict[str, NamedBlob] = {}
        self.known = {} if known is None else known

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.blobs)} blobs)"

    def __call__(self, data: bytes | memoryview) -> str:
        """Name a blob, and keep it."""
        view = memoryview(data).cast("B")
        if view.readonly or not view.nbytes:
            blob = NamedBlob.of(view)
        else:
            # The memory is kept alive by what is known of it, so its address is no other's meanwhile.
            key = ctypes.addressof(ctypes.c_char.from_buffer(view)), view.nbytes
            blob = self.known.get(key) or self.known.setdefault(key, NamedBlob.of(view))
        return self.blobs.setdefault(blob.name, blob).name


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

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.names)})"

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
        new = put if isinstance(put, NewBlobs) else NewBlobs()
        try:
            record = self._encode(value, new, codec, where)
        except RecursionError as error:
            raise CodecError(f"{where} contains itself, or is nested too deeply", field=where) from error
        if new is not put:
            for blob in new.blobs.values():
                put(blob.data[:])
        return record

    def _encode(self, value: Any, put: Put, codec: str | None, where: str) -> Any:
        if codec is not None:
            return {CODEC: codec, **self._named(codec, where).encode(value, put, where=where)}
        plain, record = _plain(value)
        if plain:
            return record
        chosen = next((codec for codec in self._codecs.values() if _handles(codec, value)), None)
        if type(value) in (list, tuple, dict) and (chosen is None or isinstance(chosen, DillCodec)):
            return self._container(value, put, where)
        if chosen is None:
            raise CodecError(f"{where}: no codec stores a {type(value).__name__}", field=where)
        return {CODEC: chosen.name, **chosen.encode(value, put, where=where)}

    def claimed_by(self, part: Any) -> str | None:
        """The name of the codec that stores whatever holds a part; None for most parts."""
        return next((codec.name for codec in self._codecs.values() if codec.claims(part)), None)

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


def _handles(codec: Codec, value: Any) -> bool:
    return (codec.types is None or isinstance(value, codec.types)) and codec.handles(value)


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


def check_format(record: Mapping[str, Any], kind: str) -> None:
    """Return if this release can read a record.

    Args:
        record: As it is stored.
        kind: What it is, for the error.

    Raises:
        FormatError: A newer release wrote it, or its `format` is no number of a format; nothing of it was read.
    """
    written = record.get(FORMAT_FIELD, 1)
    name = f"{kind} {record.get('_id')!r}"
    if isinstance(written, bool) or not isinstance(written, int) or written < 1:
        raise FormatError(f"{name} has format={written!r}, which is no number of a format", field=FORMAT_FIELD)
    if written > FORMAT:
        raise FormatError(
            f"{name} is of format {written}, written by a newer mongotorch; this one reads up to format {FORMAT}: "
            "upgrade mongotorch",
            field=FORMAT_FIELD,
        )


@final
class Opaque(str):
    """Describes a value that only its codec can read: `<torch>`, `<dill>`."""


def codec_of(record: Any) -> str | None:
    """The name of the codec that reads a record; None for plain values, references, lists and dicts."""
    return record.get(CODEC) if isinstance(record, Mapping) else None


def reference(uuid: str, *, type_id: str, identifier: str) -> dict[str, Any]:
    """The record of a reference to a component."""
    return {REFERENCE: uuid, "type_id": type_id, "identifier": identifier}


def referenced(record: Any) -> str | None:
    """The uuid of the component that a record refers to; None for every other record."""
    return record.get(REFERENCE) if isinstance(record, Mapping) else None


def sequence_record(value: Sequence[Any], items: list[Any]) -> Any:
    """The record of a list or a tuple, of which `items` are the encoded parts."""
    return items if isinstance(value, list) else {CODEC: "tuple", "items": items}


@final
class PowerOfTen(int):
    """A whole number that prints short: `10**100`. Any other number prints as it is."""

    def __repr__(self) -> str:
        digits = int.__repr__(self)
        is_power = len(digits) > _MOST_DIGITS and digits == f"1{'0' * (len(digits) - 1)}"
        return f"10**{len(digits) - 1}" if is_power else digits

    __str__ = __repr__


def describe(record: Any) -> Any:
    """A stored field in plain values, without reading a blob or importing anything.

    Args:
        record: As it is stored.

    Returns:
        Plain values as they are; tuples as tuples; a function or class as its dotted name of today; a value class
        as `{"class", "fields"}`; a query or reference as a dict; an `Opaque` for what is kept in blobs.
    """
    if isinstance(record, list):
        return [describe(part) for part in record]
    if not isinstance(record, Mapping):
        return record
    codec = codec_of(record)
    if codec == "name":
        return current_name(record["name"])
    if codec == "int":
        number = PowerOfTen(record["value"])
        return number if repr(number).startswith("10**") else int(number)
    if codec == "tuple":
        return tuple(describe(part) for part in record["items"])
    if codec in (None, "query", "value"):
        return {key: describe(part) for key, part in renamed(record).items() if key != CODEC}
    return Opaque(f"<{codec}>")


def renamed(record: Any) -> Any:
    """A stored record with today's names in it, so that records of two releases can be compared."""
    if isinstance(record, list):
        return [renamed(part) for part in record]
    if not isinstance(record, Mapping):
        return record
    found = {key: renamed(part) for key, part in record.items()}
    if codec_of(record) == "name":
        found["name"] = current_name(record["name"])
    elif codec_of(record) == "value":
        module, _, name = record["class"].partition(":")
        module = current_name(f"{module}.{name}").removesuffix(f".{name}")
        found["class"] = f"{module}:{name}"
    return found
