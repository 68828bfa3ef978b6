"""Finds the way to an object that must not be pickled, so that the error can name it.

Always: it looks and never changes anything; the pickler is what refuses, this only explains where.
"""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

_CLIENT_PACKAGES = frozenset({"pymongo", "mongomock", "motor", "gridfs"})
_CLIENT_WORDS = ("Client", "Database", "Collection", "Cursor", "GridFS", "GridOut", "GridIn")
_SECRET_WORDS = ("Credential", "Topology", "Pool", "Connection", "ChangeStream")
_MOST_OBJECTS = 100_000


def is_unsafe(value: Any) -> bool:
    """Whether a pickle of the value would carry a database client, and with it a password."""
    cls = type(value)
    if getattr(cls, "__mongotorch_unpicklable__", False):
        return True
    return any(
        base.__module__.partition(".")[0] in _CLIENT_PACKAGES
        and any(word in base.__name__ for word in _CLIENT_WORDS + _SECRET_WORDS)
        and not issubclass(base, BaseException)
        for base in cls.__mro__
    )


def path_to_unsafe(root: Any, name: str) -> str | None:
    """The shortest path from a value to an unsafe object in it, for example `objective.__closure__['db']`."""
    queue: deque[tuple[str, Any]] = deque([(name, root)])
    seen: dict[int, Any] = {}
    while queue and len(seen) < _MOST_OBJECTS:
        path, value = queue.popleft()
        if is_unsafe(value):
            return path
        if id(value) in seen:
            continue
        seen[id(value)] = value  # kept alive, or the id could come back as another object's
        queue.extend((path + step, part) for step, part in _parts(value))
    return None


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, FunctionType):
        yield from _function_parts(value)
    elif isinstance(value, MethodType):
        yield ".__self__", value.__self__
        yield "", value.__func__
    elif isinstance(value, functools.partial):
        yield ".func", value.func
        yield ".args", value.args
        yield ".keywords", value.keywords
    elif isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from ((f"[{index}]", part) for index, part in enumerate(value))
    elif isinstance(value, (staticmethod, classmethod)):
        yield "", value.__func__
    elif isinstance(value, property):
        yield from ((f".{part}", getattr(value, part)) for part in ("fget", "fset", "fdel"))
    elif isinstance(value, type):
        # Only a class that is pickled by value carries what its attributes hold.
        if value.__module__ == "__main__" or "<" in value.__qualname__:
            yield from ((f".{key}", part) for key, part in vars(value).items())
    else:
        yield from ((f".{key}", part) for key, part in _attributes(value))
        yield "", type(value)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(value, "__dict__", {}).items()
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            member = vars(cls).get(slot)
            if inspect.ismemberdescriptor(member):
                try:
                    yield slot, member.__get__(value)
                except AttributeError:  # a slot that is still empty
                    continue


def _code_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a function inside the function
            yield from _code_names(constant)


def _function_parts(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for cell_name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield f".__closure__[{cell_name!r}]", cell.cell_contents
        except ValueError:  # a cell that is still empty
            continue
    yield ".__defaults__", function.__defaults__
    yield ".__kwdefaults__", function.__kwdefaults__
    for used in dict.fromkeys(_code_names(function.__code__)):
        value = function.__globals__.get(used)
        if not inspect.ismodule(value):
            yield f".__globals__[{used!r}]", value
    yield from ((f".{key}", part) for key, part in vars(function).items())
