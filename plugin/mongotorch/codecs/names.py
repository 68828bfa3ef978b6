"""Stores by name: functions and classes, and small values of classes that opt in, so that records outlive files.

What can be imported is stored by name, not as bytes. What mongotorch offers is stored by its public name
(`mongotorch.Cron`), whichever file defines it. The first releases stored the path of that file; `FIRST_NAMES` maps
those paths, and only ever grows.

A class opts in as a frozen dataclass that declares `__mongotorch_value__ = True` and can be imported by name: its
values are stored field by field, readable and searchable, which a pickle is not.

Guarantees: a name is given only where importing it gives the very same object; `__main__` and what is local to a
function have no name. Names of other packages and of a user's own code are never changed. A digest of content
uses the names of the first releases, so that what they stored is recognised. Reading a value makes no object of
any other class, whatever a record says, and runs the checks that the class makes at construction.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import ModuleType
from typing import Any, Final, Self, final

from mongotorch.codecs.base import Codec, Get, Put, Registry
from mongotorch.errors import CodecError, ParameterError

PACKAGE: Final = "mongotorch"
MARKER: Final = "__mongotorch_value__"
"""What a class declares as True to have its values stored field by field."""
SPAWNED_MAIN: Final = "__mp_main__"
"""What multiprocessing calls the main script in a spawned process; importable nowhere else."""
PUBLIC_MODULES: Final = ("mongotorch.codecs", "mongotorch.demo", "mongotorch.testing")
"""Packages besides `mongotorch` itself that offer public names; a module that is public itself needs no entry."""


def _first(module: str, names: str, public: str = PACKAGE) -> dict[str, str]:
    return {f"{PACKAGE}.{module}.{name}": f"{public}.{name}" for name in names.split()}


FIRST_NAMES: Final[Mapping[str, str]] = {
    **_first("component", "Component"),
    **_first("datalayer", "Datalayer"),
    **_first("errors", "MongotorchError"),
    **_first("key", "Key"),
    **_first("query", "Query"),
    **_first("run.engine", "Engine LocalEngine QueueEngine"),
    **_first("run.gates", "Always Asked Better Gate Never"),
    **_first("run.job", "Job"),
    **_first("run.preview", "Firing preview"),
    **_first("run.schedule", "Schedule"),
    **_first("run.scores", "Scores Verdict"),
    **_first("run.triggers.base", "Decision State Trigger"),
    **_first("run.triggers.combined", "AllOf AnyOf"),
    **_first("run.triggers.cron", "Cron"),
    **_first("run.triggers.documents", "Changed NewDocuments Waited"),
    **_first("run.triggers.every", "Every"),
    **_first("run.triggers.metric", "MetricAbove MetricBelow"),
    **_first("run.worker", "Worker"),
    **_first("settings", "Settings"),
    **_first("store.aliases", "Move"),
    **_first("train.mapping", "Passed"),
    **_first("train.metrics", "Dataset Metric Validation"),
    **_first("train.model", "TorchModel"),
    **_first("train.trainer", "TorchTrainer"),
    **_first("wiring.collection", "Collection"),
    **_first("wiring.live", "Live"),
    **_first("codecs.arrays", "ArrayParts decode_document encode_document", "mongotorch.codecs"),
    **_first("codecs.arrays", "numpy_array numpy_parts", "mongotorch.codecs"),
    **_first("codecs.base", "Codec", "mongotorch.codecs"),
    **_first("codecs.names", "name_of resolve", "mongotorch.codecs"),
    **_first("codecs.pickles", "Pickled check_python dumps loads running_python", "mongotorch.codecs"),
    **_first("codecs.registry", "Codecs", "mongotorch.codecs"),
    **_first("demo.digits", "DigitsNet Outcome accuracy run_demo", "mongotorch.demo"),
    **_first("testing.codecs", "CodecSuite", "mongotorch.testing"),
    **_first("testing.engines", "EngineSuite WaitingEngineSuite", "mongotorch.testing"),
    **_first("testing.stores", "StoreSuite Thing", "mongotorch.testing"),
    **_first("testing.triggers", "TriggerSuite", "mongotorch.testing"),
}
"""From the path that the first releases stored to the public name."""
_FIRST_OF: Final = {public: first for first, public in FIRST_NAMES.items()}
_replaced: ContextVar[list[str] | None] = ContextVar("mongotorch_first_names", default=None)


def stored_name(module: str, qualname: str) -> tuple[str, str]:
    """The module and name that are stored for a class or function.

    Args:
        module: Its `__module__`.
        qualname: Its `__qualname__`.

    Returns:
        Those of its public name where it is mongotorch's own and public, else both as they are.
    """
    if not module.startswith(f"{PACKAGE}."):
        return module, qualname
    top = qualname.partition(".")[0]
    home = _home(module, top)
    replaced = _replaced.get()
    if replaced is not None and (first := _FIRST_OF.get(f"{home}.{top}")):
        replaced.append(first)
        home = first.rpartition(".")[0]
    return home, qualname


def current_name(name: str) -> str:
    """The name by which today's mongotorch knows what any release stored under a dotted name."""
    if not name.startswith(f"{PACKAGE}."):
        return name
    parts = name.split(".")
    for length in range(len(parts), 1, -1):
        public = FIRST_NAMES.get(".".join(parts[:length]))
        if public is not None:
            return ".".join([public, *parts[length:]])
    return name


@contextlib.contextmanager
def first_names() -> Iterator[None]:
    """Let `stored_name` give the names that the first releases stored, inside and in this thread; for digests."""
    before = _replaced.set([])
    try:
        yield
    finally:
        _replaced.reset(before)


def first_names_given() -> int | None:
    """How many names `stored_name` gave inside `first_names` that are no longer those of today; None outside."""
    replaced = _replaced.get()
    return None if replaced is None else len(replaced)


def _home(module: str, top: str) -> str:
    """The public module that offers a top-level name of a module; that module where none does."""
    own = getattr(sys.modules.get(module), top, None)
    if own is not None:
        for home in (PACKAGE, *PUBLIC_MODULES):
            inside = home == PACKAGE or module.startswith(f"{home}.")
            if inside and getattr(importlib.import_module(home), top, None) is own:
                return home
    return module


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


def resolve_in(home: ModuleType, given: str) -> Any:
    """What a short name in a module, or `package.module:Name`, stands for; None where the module lacks it.

    Raises:
        CodecError: What follows the colon cannot be imported here.
    """
    module, colon, attribute = given.partition(":")
    return resolve(f"{module}.{attribute}") if colon else getattr(home, given, None)


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
