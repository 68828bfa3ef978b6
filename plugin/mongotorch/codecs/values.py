"""Small values of classes that say so, field by field: readable and searchable where a pickle is neither.

Always: a class takes part only if it is a frozen dataclass that declares `__mongotorch_value__ = True` and can be
imported by name; reading makes nothing of any other class, whatever a record says, and runs the checks that the
class makes at construction.

What can be imported by name is stored as that name, not as bytes.

Guarantees: a name is given only where importing it gives the very same object again; what mongotorch itself
offers has its public name; `__main__` and what is local to a function have no name.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from typing import Any, Self, final

from mongotorch.codecs.base import Codec, Get, Put, Registry
from mongotorch.codecs.public_names import current_name, stored_name
from mongotorch.errors import CodecError, ParameterError

SPAWNED_MAIN = "__mp_main__"
"""What multiprocessing calls the main script in a spawned process; importable nowhere else."""


def name_of(value: Any) -> str | None:
    """The dotted name by which a function or class can be imported; None where there is none."""
    module, qualname = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str) or not callable(value):
        return None
    if module in ("__main__", SPAWNED_MAIN) or "<" in qualname:
        return None
    try:
        found = resolve(f"{module}.{qualname}")
    except CodecError:
        return None
    return ".".join(stored_name(module, qualname)) if found is value else None


def resolve(name: str) -> Any:
    """What a dotted name stands for, also one that an older release stored.

    Raises:
        CodecError: It cannot be imported here.
    """
    parts = current_name(name).split(".")
    cause: Exception | None = None
    for length in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except Exception as error:  # noqa: BLE001 - importing runs foreign code, which can raise anything
            cause = cause or error
            continue
        try:
            for part in parts[length:]:
                found = getattr(found, part)
        except AttributeError:
            continue
        return found
    raise CodecError(f"{name!r} cannot be imported here; install or put on the path what defines it") from cause


@final
class NameCodec(Codec):
    """Functions and classes that can be imported, as their name."""

    name = "name"

    def handles(self, value: Any) -> bool:
        """Whether the value can be imported by name."""
        return name_of(value) is not None

    def encode(self, value: Any, put: Put, *, where: str) -> dict[str, Any]:  # noqa: ARG002
        """The name. Raises: CodecError when it has none."""
        name = name_of(value)
        if name is None:
            raise CodecError(f"{where} cannot be imported by name; leave the codec to its default", field=where)
        return {"name": name}

    def decode(self, record: Mapping[str, Any], get: Get) -> Any:  # noqa: ARG002
        """What the name stands for. Raises: CodecError when it cannot be imported here."""
        return resolve(record["name"])


MARKER = "__mongotorch_value__"


@final
class ValueCodec(Codec):
    """Frozen dataclasses that declare `__mongotorch_value__ = True`, as the name of their class and their fields.

    Args:
        registry: For the fields; the registry that it becomes part of gives itself.
    """

    name = "value"

    def __init__(self, registry: Registry | None = None) -> None:
        self._registry = registry

    def bound(self, registry: Registry) -> Self:
        """The codec for a registry: the fields of a value are stored as anything else in it is."""
        return type(self)(registry)

    def handles(self, value: Any) -> bool:
        """Whether its class says so and can be imported by name."""
        return _is_value_class(type(value)) and name_of(type(value)) is not None

    def encode(self, value: Any, put: Put, *, where: str) -> dict[str, Any]:
        """The name of the class, and the fields. Raises: CodecError for what is no such value."""
        cls = type(value)
        if not self.handles(value):
            raise CodecError(
                f"{where} is a {cls.__qualname__}; stored as a value is a frozen dataclass that declares "
                f"{MARKER} = True and can be imported by name",
                field=where,
            )
        if _takes_more(cls):
            raise CodecError(
                f"{where}: __post_init__ of {cls.__qualname__} takes arguments, which are lost", field=where
            )
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(cls) if field.init}
        return {
            "class": ":".join(stored_name(cls.__module__, cls.__qualname__)),
            "fields": self._fields.encode(fields, put, where=where),
        }

    def decode(self, record: Mapping[str, Any], get: Get) -> Any:
        """The value. Raises: CodecError when its class cannot be imported, is none such, or refuses the fields."""
        module, _, name = str(record["class"]).partition(":")
        cls = resolve(f"{module}.{name}")
        if not (isinstance(cls, type) and _is_value_class(cls)):
            raise CodecError(
                f"{record['class']!r} is no class whose values are stored: no frozen dataclass that declares "
                f"{MARKER} = True",
                field="class",
            )
        try:
            return _made(cls, self._fields.decode(record["fields"], get))
        except ParameterError as error:
            raise CodecError(f"{record['class']}: {error.message}", field=error.field) from error

    @property
    def _fields(self) -> Registry:
        if self._registry is None:
            raise CodecError("the codec 'value' stores fields by the codecs of a registry; take it from one")
        return self._registry


def _is_value_class(cls: type) -> bool:
    declared = getattr(cls, MARKER, False) is True and dataclasses.is_dataclass(cls)
    return declared and bool(cls.__dataclass_params__.frozen)  # type: ignore[attr-defined]


def _takes_more(cls: type) -> bool:
    check = getattr(cls, "__post_init__", None)
    return check is not None and len(inspect.signature(check).parameters) > 1


def _made(cls: type, stored: Mapping[str, Any]) -> Any:
    """A value without its `__init__`, whose arguments may be other than the fields; its own check runs."""
    wanted = {field.name for field in dataclasses.fields(cls) if field.init}
    if unknown := set(stored) - wanted:
        raise CodecError(f"{cls.__qualname__} has no {sorted(unknown)}; a newer version of it wrote this record")
    value: Any = object.__new__(cls)
    for field in dataclasses.fields(cls):
        if field.name in stored:
            object.__setattr__(value, field.name, stored[field.name])
        elif field.default is not dataclasses.MISSING:
            object.__setattr__(value, field.name, field.default)
        elif field.default_factory is not dataclasses.MISSING:
            object.__setattr__(value, field.name, field.default_factory())
        elif field.init:
            raise CodecError(f"{cls.__qualname__} needs {field.name!r}, which the record lacks", field=field.name)
    if hasattr(value, "__post_init__"):
        value.__post_init__()
    return value
