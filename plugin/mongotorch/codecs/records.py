"""Reads what stored records say of themselves, without decoding them: format, codec, reference and description.

Every document that mongotorch writes has the number of its format in `format`; one without it was written by the
first releases and is of format 1. This release reads formats 1 and 2 and writes 2.

A field of a component is stored as plain BSON, as a record `{"_codec": name, ...}` that a codec reads, or as a
reference `{"_ref": uuid, "type_id", "identifier"}` to another component. Lists and dicts hold such parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, final

from mongotorch.codecs.names import current_name
from mongotorch.errors import FormatError

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
        return int(record["value"])
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
