"""Defines the Component: what has an identifier, a uuid and versions, and is stored field by field.

What is stored is its class by name and its fields by codec, never the object as a whole, and never the datalayer
that it was given.

Guarantees: a component is a frozen value; its uuid belongs to one stored version.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import inspect
import math
import re
import uuid as uuids
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, ClassVar, Final, ParamSpec, Self, TypeVar, final

import bson

from mongotorch.codecs import (
    CODEC,
    Codecs,
    Get,
    NamedBlob,
    NewBlobs,
    codec_of,
    first_names,
    first_names_given,
    reference,
    referenced,
    sequence_record,
)
from mongotorch.errors import CodecError, IdentifierError, ParameterError
from mongotorch.notebook import html_pairs
from mongotorch.query import Query

IDENTIFIER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
ADDED: Final = "added"
"""Key in the metadata of a field that a later release gave a component; its value is that release's version.
Such a field is stored only where it is not at its default, so that records are those of the earlier release."""
_IDENTITY = frozenset({"identifier", "db", "uuid"})
_NAMES: Final = frozenset({"type_id", "identifier", "alias", "uuid", "uuid1", "uuid2", "status", "collection"})
_NUMBERS: Final = frozenset({"version", "limit", "priority"})
_FLAGS: Final = frozenset({"force", "dry_run", "anyway", "shuffle"})
_SECONDS: Final = frozenset({"grace_s", "step_seconds"})
_LONGEST_NAME: Final = 255  # characters
P = ParamSpec("P")
R = TypeVar("R")
Ref = Callable[["Component"], str]
"""From a component to the uuid under which it is, or will be, stored."""
LoadRef = Callable[[str], "Component"]
"""From a uuid to the component."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Component(abc.ABC):
    """A value that the datalayer stores under a type, an identifier and a version.

    Args:
        identifier: Its name, `[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}`.
        db: The datalayer that `apply()` uses; never stored.
        uuid: The identity of the version it becomes; made when none is given.
        artifacts: `{field: codec name}`, over the default choice of codec.

    Raises:
        IdentifierError: The identifier is none.
        ParameterError: `artifacts` names a field that does not exist.
    """

    type_id: ClassVar[str]

    identifier: str
    db: Any = None
    uuid: str = None  # type: ignore[assignment]  # the seed's signature; a uuid is made below
    _: dataclasses.KW_ONLY
    artifacts: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.identifier, str) or not IDENTIFIER.fullmatch(self.identifier):
            raise IdentifierError(
                f"identifier {self.identifier!r}: use letters, digits and _ . - (not first), at most 200",
                field="identifier",
            )
        if self.uuid is None:
            object.__setattr__(self, "uuid", str(uuids.uuid4()))
        unknown = set(self.artifacts or {}) - {field.name for field in stored_fields(type(self))}
        if unknown:
            raise ParameterError(f"artifacts: {sorted(unknown)} are no fields of it", field="artifacts")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.identifier!r}, version={self.version}, uuid={self.uuid!r})"

    def _repr_html_(self) -> str:
        kind = type(self).__name__
        return html_pairs(f"{kind} {self.identifier}", [("version", self.version), ("uuid", self.uuid)])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Component) or type(self) is not type(other):
            return NotImplemented
        codecs = Codecs.default()
        return content_digest(self, Encoder(codecs)) == content_digest(other, Encoder(codecs))

    def __hash__(self) -> int:
        return hash((self.type_id, self.identifier))

    @property
    def version(self) -> int | None:
        """The version number under which it is stored; None until it is."""
        version: int | None = self.__dict__.get("_version")
        return version

    @property
    def trained(self) -> bool:
        """Whether it is a stored version that a run published."""
        return bool(self.__dict__.get("_trained"))

    def replace(self, **changes: Any) -> Self:
        """A changed copy with a uuid of its own, not stored yet."""
        return dataclasses.replace(self, **{"uuid": None, **changes})

    def apply(self) -> Any:
        """Apply it to the datalayer it was given; see `Datalayer.apply`. Raises: ParameterError without one."""
        if self.db is None:
            raise ParameterError(f"{self!r} was given no db; use db.apply(component)", field="db")
        return self.db.apply(self)


def stored_fields(cls: type[Component]) -> list[dataclasses.Field[Any]]:
    """The fields of a class that are stored."""
    return [field for field in dataclasses.fields(cls) if field.name not in _IDENTITY]


@final
class Encoder:
    """Encodes the values of components, each once: what the digest of a component is made of is what is stored.

    A value is encoded again only where its record holds names that were others in the first releases.

    Args:
        codecs: The codecs to choose from.

    Attributes:
        blobs: By name, the blobs of all records.
    """

    def __init__(self, codecs: Codecs) -> None:
        self._codecs = codecs
        self._new = NewBlobs()
        # The value is kept alive, or its id could come back as another's.
        self._records: dict[tuple[int, str | None, bool], tuple[Any, Any, frozenset[str]]] = {}
        self.blobs: dict[str, NamedBlob] = {}

    def encode(self, value: Any, *, where: str, codec: str | None = None, own: set[str] | None = None) -> Any:
        """The record of a value.

        Args:
            value: Anything but a component.
            where: Its name, for errors.
            codec: The name of the codec to use, over the default choice.
            own: Takes the names of the blobs of the record.

        Raises:
            CodecError: It cannot be stored.
        """
        before = first_names_given()
        key = (id(value), codec, before is not None)
        if key not in self._records:
            new = NewBlobs(self._new.known)
            record = self._codecs.encode(value, new, codec=codec, where=where)
            self.blobs |= new.blobs
            self._records[key] = entry = (value, record, frozenset(new.blobs))
            if before is not None and first_names_given() == before:
                self._records[id(value), codec, False] = entry
        _, record, names = self._records[key]
        if own is not None:
            own |= names
        return record


def encode_component(
    component: Component,
    encoder: Encoder,
    ref: Ref,
    *,
    known: Mapping[str, Any] | None = None,
    own: set[str] | None = None,
) -> dict[str, Any]:
    """The record `{"class", "fields"}` of a component.

    Args:
        component: What to encode.
        encoder: Encodes its fields and keeps their blobs.
        ref: Called for each component among the fields.
        known: By field, records that are taken as they are: those fields are not encoded.
        own: Takes the names of the blobs of the fields that are encoded.

    Raises:
        CodecError: A field cannot be stored; `field` names it.
    """
    records = known or {}
    fields = {
        field.name: records[field.name]
        if field.name in records
        else _encode_field(component, field.name, encoder, ref, own)
        for field in stored_fields(type(component))
        if ADDED not in field.metadata or not _is_default(field, getattr(component, field.name))
    }
    return {"class": encoder.encode(type(component), where="class", own=own), "fields": fields}


def begin_component(document: Mapping[str, Any], codecs: Codecs, get: Get) -> Component:
    """A component of a stored document without its fields, so that others can already refer to it.

    Raises:
        CodecError: Its class cannot be imported here, or is no component.
    """
    cls = codecs.decode(document["class"], get)
    if not isinstance(cls, type) or not issubclass(cls, Component):
        raise CodecError(f"{document['_id']}: its class is {cls!r}, which is no component", field="class")
    component: Component = object.__new__(cls)
    for name in ("identifier", "version"):
        object.__setattr__(component, "_version" if name == "version" else name, document[name])
    object.__setattr__(component, "uuid", document["_id"])
    object.__setattr__(component, "_trained", is_trained(document))
    object.__setattr__(component, "db", None)
    return component


def fill_component(
    component: Component, document: Mapping[str, Any], codecs: Codecs, get: Get, load_ref: LoadRef
) -> None:
    """Fill the fields of a begun component; one that an older version did not store takes its default.

    Raises:
        CodecError: A field cannot be read back; `field` names it.
    """
    for field in stored_fields(type(component)):
        if field.name in document["fields"]:
            value = _decode(document["fields"][field.name], codecs, get, load_ref)
        else:
            value = _default(field)
        object.__setattr__(component, field.name, value)


def is_trained(document: Mapping[str, Any]) -> bool:
    """Whether a stored document is a version that a run published, rather than one that was applied."""
    return document.get("job") is not None


def is_refused(document: Mapping[str, Any]) -> bool:
    """Whether a stored document is a version that the gate of a schedule did not let through."""
    return (document.get("verdict") or {}).get("promote") is False


def title(document: Mapping[str, Any]) -> str:
    """A component document in words: kind, name and version."""
    return f"version {document['version']} of {document['type_id']} {document['identifier']!r}"


def content_digest(
    component: Component, encoder: Encoder, *, known: Mapping[int, Mapping[str, Any]] | None = None
) -> str:
    """SHA-256, in hex, of a component's class, identifier and fields, without uuid, version and db.

    The same component has the same digest in every release: names are those of the first releases, and a field
    that came later is stored only where it is not at its default.

    Args:
        component: What to digest.
        encoder: Encodes its fields.
        known: By the `id` of a component and by field, what `digest_fields` gave of fields that did not change.

    Raises:
        CodecError: A field cannot be stored; `field` names it.
    """
    with first_names():
        return _digest(component, encoder, {}, known or {})


def digest_fields(component: Component, encoder: Encoder, names: Iterable[str]) -> dict[str, Any]:
    """The part that some fields have in the digest of a component. Raises: CodecError."""
    with first_names():
        return {
            name: _encode_field(component, name, encoder, lambda one: _digest(one, encoder, {}, {}), None)
            for name in names
        }


def _digest(
    component: Component, encoder: Encoder, met: dict[int, str], known: Mapping[int, Mapping[str, Any]]
) -> str:
    if id(component) in met:
        return met[id(component)]
    met[id(component)] = f"cycle:{component.type_id}:{component.identifier}"

    def ref(child: Component) -> str:
        return _digest(child, encoder, met, known)

    body = encode_component(component, encoder, ref, known=known.get(id(component)))
    content = {"type_id": component.type_id, "identifier": component.identifier, **body}
    met[id(component)] = hashlib.sha256(bson.encode(content)).hexdigest()
    return met[id(component)]


def _encode_field(component: Component, name: str, encoder: Encoder, ref: Ref, own: set[str] | None) -> Any:
    chosen = (component.artifacts or {}).get(name)
    return _encode(getattr(component, name), encoder, ref, own, name, chosen)


def _encode(value: Any, encoder: Encoder, ref: Ref, own: set[str] | None, where: str, codec: str | None) -> Any:
    if isinstance(value, Component):
        return reference(ref(value), type_id=value.type_id, identifier=value.identifier)
    if isinstance(value, Query):
        return {CODEC: "query", **value.to_document()}
    if codec is None and _holds_component(value):
        items = [_encode(v, encoder, ref, own, f"{where}[{n}]", None) for n, v in enumerate(value)]
        return sequence_record(value, items)
    return encoder.encode(value, where=where, codec=codec, own=own)


def _decode(record: Any, codecs: Codecs, get: Get, load_ref: LoadRef) -> Any:
    uuid, codec = referenced(record), codec_of(record)
    if uuid is not None:
        return load_ref(uuid)
    if codec == "query":
        return Query.from_document(record)
    if codec == "tuple":
        return tuple(_decode(part, codecs, get, load_ref) for part in record["items"])
    if isinstance(record, list):
        return [_decode(part, codecs, get, load_ref) for part in record]
    return codecs.decode(record, get)


def _holds_component(value: Any) -> bool:
    if type(value) in (list, tuple):
        return any(_holds_component(part) for part in value)
    return isinstance(value, Component)


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    default = _default(field)
    return value is default or (type(value) is type(default) and bool(value == default))


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    raise CodecError(f"field {field.name!r} is not in the stored document and has no default", field=field.name)


def arguments_checked(method: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public method: its names are text, its numbers whole and its flags booleans before it begins.

    A mapping in place of a name would be an operator of a query, and match anything.

    Args:
        method: One with parameters such as `identifier`, `uuid`, `version`, `alias`, `query`, `force` or `since`;
            others are not looked at.

    Returns:
        The method, which raises IdentifierError for a name and ParameterError for anything else that is none.
    """
    parameters = inspect.signature(method)

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in parameters.bind(*args, **kwargs).arguments.items():
            if value is not None or parameters.parameters[name].default is not None:
                _check_given(name, value)
        return method(*args, **kwargs)

    return call


def _check_given(name: str, value: Any) -> None:
    if name not in _NAMES:
        if name in _MEANT and not _MEANT[name][1](value):
            raise ParameterError(f"{name} must be {_MEANT[name][0]}, not {_shown(value)}", field=name)
        return
    try:
        is_name = isinstance(value, str) and len(value) <= _LONGEST_NAME and value.encode() is not None
    except UnicodeEncodeError:
        is_name = False
    if not is_name or "\0" in value:
        raise IdentifierError(
            f"{name} must be text of at most {_LONGEST_NAME} characters, not {_shown(value)}", field=name
        )


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


_MEANT: Final[Mapping[str, tuple[str, Callable[[Any], bool]]]] = {
    **dict.fromkeys(_NUMBERS, ("a whole number", lambda value: type(value) is int and abs(value) < 2**31)),
    **dict.fromkeys(_FLAGS, ("True or False", lambda value: isinstance(value, bool))),
    **dict.fromkeys(_SECONDS, ("a number of seconds from 0 on", _is_seconds)),
    **dict.fromkeys(("since", "until"), ("a datetime", lambda value: isinstance(value, datetime))),
    "seed": ("a whole number", lambda value: type(value) is int),
    "query": ('a query, such as db["name"].find()', lambda value: isinstance(value, Query)),
    "component": ("a component, such as a trainer", lambda value: isinstance(value, Component)),
}


def _shown(value: Any) -> str:
    return f"{ascii(value)[:60]} ({type(value).__name__})"
