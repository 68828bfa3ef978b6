"""Stores small values of classes that opt in, field by field: readable and searchable, which a pickle is not.

A class opts in as a frozen dataclass that declares `__mongotorch_value__ = True` and can be imported by name.

Guarantees: reading makes no object of any other class, whatever a record says, and runs the checks that the class
makes at construction.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, Self, final

from mongotorch.codecs.base import Codec, Get, Put, Registry
from mongotorch.codecs.names import name_of, resolve, stored_name
from mongotorch.errors import CodecError, ParameterError

MARKER = "__mongotorch_value__"


@final
class ValueCodec(Codec):
    """Frozen dataclasses that declare `__mongotorch_value__ = True`, as the name of their class and their fields.

    Args:
        registry: Stores the fields; a registry gives itself when the codec becomes part of it.
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
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    if unknown := set(stored) - known:
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
