"""Pickles what has no name, such as lambdas and classes of `__main__`, with dill, and refuses what is unsafe.

A function carries only the globals that it refers to, and mongotorch's own classes and functions are pickled by
their public names.

Guarantees: a database client is refused, and the error names the path to it, before a byte is handed on. A pickle
that holds bytecode records the Python minor version, and another version refuses it before reading it, since
foreign bytecode can crash the interpreter. The same content gives the same bytes.
"""

from __future__ import annotations

import functools
import inspect
import io
import pickle
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any, NamedTuple, Self, final

import dill
from dill._dill import _setitems

from mongotorch.codecs.base import Codec, Get, Put, Registry
from mongotorch.codecs.names import PACKAGE, SPAWNED_MAIN, resolve, stored_name
from mongotorch.errors import CodecError, MongotorchError, PythonVersionError, UnsafeClosureError

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


# What dill writes for a code object; a text that happens to say the same only pins the version needlessly.
_BYTECODE_MARK = b"_create_code"


class Pickled(NamedTuple):
    """A pickle, and the Python minor version (`3.11`) if it holds bytecode of it."""

    data: bytes
    python: str | None


def running_python() -> str:
    """The minor version that runs, as `3.11`."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def dumps(
    value: Any,
    *,
    where: str,
    external: Callable[[Any], Any] | None = None,
    reduce: Callable[[Any], tuple[Any, ...] | None] | None = None,
) -> Pickled:
    """Pickle a value.

    Args:
        value: What to pickle.
        where: Its name, where the path in an error starts.
        external: For each object inside: what stands for it (kept outside the pickle), or None to pickle it.
        reduce: For each object inside: what `__reduce_ex__` should give instead of its own, or None for its own.

    Raises:
        UnsafeClosureError: It holds a database client or a datalayer; `field` is the path to it.
        CodecError: It cannot be pickled.
    """
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, external, reduce).dump(value)
    except _UnsafeObjectError as refused:
        path = path_to_unsafe(value, where) or where
        raise UnsafeClosureError(
            f"{path} is a {refused.kind}: storing it would write the connection, and its password, into the "
            "database; pass what it reads as a value, or open it inside the function",
            field=path,
        ) from None
    except MongotorchError:
        raise
    except Exception as error:  # a pickled object's own code can raise anything
        raise CodecError(f"{where} cannot be pickled: {type(error).__name__}: {error}", field=where) from error
    data = buffer.getvalue()
    return Pickled(data, running_python() if _BYTECODE_MARK in data else None)


def check_python(python: str | None) -> None:
    """Refuse bytecode of another Python minor version. Raises: PythonVersionError."""
    if python is not None and python != running_python():
        raise PythonVersionError(
            f"stored under Python {python} with bytecode in it, and this is Python {running_python()}; load it "
            f"with Python {python}, or store it again from functions that can be imported by name"
        )


def loads(data: bytes, *, python: str | None, external: Callable[[Any], Any] | None = None) -> Any:
    """Unpickle verified bytes.

    Args:
        data: The pickle.
        python: The minor version that was recorded with it.
        external: From what stands for an object to the object.

    Raises:
        PythonVersionError: It holds bytecode of another minor version; nothing was unpickled.
        CodecError: It cannot be unpickled here.
    """
    check_python(python)
    try:
        return _Unpickler(io.BytesIO(data), external).load()
    except MongotorchError:  # what `external` raises, such as a blob that is not what was stored
        raise
    except Exception as error:  # unpickling runs foreign code, which can raise anything
        raise CodecError(f"cannot be unpickled here: {type(error).__name__}: {error}") from error


@final
class DillCodec(Codec):
    """Anything that has no name and no codec of its own, by dill.

    Args:
        registry: Says which other codec stores a value for the sake of a part, such as a tensor in a closure; the
            registry that it becomes part of gives itself.
    """

    name = "dill"

    def __init__(self, registry: Registry | None = None) -> None:
        self._registry = registry

    def bound(self, registry: Registry) -> Self:
        """The codec for a registry."""
        return type(self)(registry)

    def handles(self, value: Any) -> bool:  # noqa: ARG002
        """True for any value: it is the last resort."""
        return True

    def encode(self, value: Any, put: Put, *, where: str) -> dict[str, Any]:
        """A pickle beside the record, or the record of the codec that claims a part of the value.

        Raises:
            UnsafeClosureError, CodecError: As `dumps`.
        """
        registry = self._registry

        def refuse_claimed(part: Any) -> None:
            name = None if registry is None else registry.claimed_by(part)
            if name is not None:
                raise _ClaimedError(name)

        try:
            pickled = dumps(value, where=where, external=refuse_claimed)
        except _ClaimedError as claimed:
            assert registry is not None  # noqa: S101 - for the type checker
            record: dict[str, Any] = registry.encode(value, put, codec=claimed.name, where=where)
            return record
        return {"blob": put(pickled.data), "python": pickled.python}

    def decode(self, record: Mapping[str, Any], get: Get) -> Any:
        """The value. Raises: PythonVersionError before reading, CodecError."""
        check_python(record["python"])
        return loads(get(record["blob"]), python=record["python"])


def _is_own(value: Any) -> bool:
    """Whether it is a class or function of mongotorch that can be imported."""
    module = value.__module__
    if not isinstance(module, str) or not module.startswith(f"{PACKAGE}.") or "<" in value.__qualname__:
        return False
    try:
        return resolve(f"{value.__module__}.{value.__qualname__}") is value
    except CodecError:
        return False


def _are_texts(values: Iterable[Any]) -> bool:
    return all(type(value) is str for value in values)


class _ClaimedError(MongotorchError):
    def __init__(self, name: str) -> None:
        super().__init__(f"it holds what the codec {name!r} stores")
        self.name = name


class _UnsafeObjectError(Exception):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


class _Postponed(dict[int, list[Any]]):
    """What dill does after an object is pickled, with the globals of functions filled in a fixed order."""

    def pop(self, key: int) -> list[Any]:  # type: ignore[override]
        """The calls for one object, as (function, arguments)."""
        return [(function, _ordered(function, args)) for function, args in super().pop(key)]


def _ordered(function: Any, args: Any) -> Any:
    if function is not _setitems or not _are_texts(args[1]):
        return args
    return args[0], dict(sorted(args[1].items()))


class _Pickler(dill.Pickler):  # type: ignore[misc]
    def __init__(
        self,
        file: io.BytesIO,
        external: Callable[[Any], Any] | None,
        reduce: Callable[[Any], tuple[Any, ...] | None] | None,
    ) -> None:
        # The protocol is fixed: its default follows the Python version, and the digest of a value must not.
        super().__init__(file, protocol=4, recurse=True, byref=False, fmode=0)
        self._external, self._reduce = external, reduce
        self._texts: dict[str, str] = {}
        self._safe: set[type] = set()
        self._postproc = _Postponed()

    # The same content gives the same bytes, in any process and however often it was pickled before. Three things
    # would differ: which equal texts are one object, the order of a set, and the order of globals.

    def save(self, value: Any, save_persistent_id: bool = True) -> None:
        """Called for every object: equal texts become one, and sets of texts are ordered."""
        if type(value) is str:
            value = self._texts.setdefault(value, value)
        elif type(value) in (set, frozenset) and id(value) not in self.memo and _are_texts(value):
            self.save_reduce(type(value), (sorted(value),), obj=value)
            return
        elif isinstance(value, (type, FunctionType)) and id(value) not in self.memo and _is_own(value):
            # As pickle writes what can be imported, but by the name that is stored.
            for part in stored_name(value.__module__, value.__qualname__):
                self.save(part)
            self.write(pickle.STACK_GLOBAL)
            self.memoize(value)
            return
        elif (
            self._reduce is not None and id(value) not in self.memo and (parts := self._reduce(value)) is not None
        ):
            self.save_reduce(*parts, obj=value)
            return
        super().save(value, save_persistent_id)

    def persistent_id(self, value: Any) -> Any:
        """Called for every object before it is pickled: the place to refuse one, or to keep it outside."""
        cls = type(value)
        if cls not in self._safe:  # most objects are of few classes
            if is_unsafe(value):
                raise _UnsafeObjectError(f"{cls.__module__}.{cls.__qualname__}")
            self._safe.add(cls)
        if isinstance(value, (type, FunctionType)) and getattr(value, "__module__", None) == SPAWNED_MAIN:
            raise CodecError(
                f"{value.__qualname__} belongs to the main script of a spawned process, which no other process "
                "can import; move it to a module"
            )
        return None if self._external is None else self._external(value)


class _Unpickler(dill.Unpickler):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO, external: Callable[[Any], Any] | None) -> None:
        # Else dill gives an object of a class of `__main__` whatever class the loading script has by that name.
        super().__init__(file, ignore=True)
        self._external = external

    def find_class(self, module: str, name: str) -> Any:
        """A class or function by name; mongotorch's own also by the names that older releases stored."""
        if module.startswith(f"{PACKAGE}."):
            return resolve(f"{module}.{name}")
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        """The object that was kept outside."""
        if self._external is None:
            raise CodecError("the pickle refers to tensors that its record does not list")
        return self._external(pid)
