"""Parses `key` and checks `signature`: which fields make a sample, in what structure, and how it goes into a call.

A sample and a batch have the same structure: a single value, a tuple, a dict, or `(list, dict)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, final

from mongotorch.errors import ParameterError, SignatureError

Form = Literal["single", "tuple", "dict", "both"]
Signature = Literal["*args", "**kwargs", "*args,**kwargs", "singleton"]
OBJECTIVE: Final = "objective"
"""The name under which a validation measures the training objective."""
SIGNATURES: tuple[Signature, ...] = ("*args", "**kwargs", "*args,**kwargs", "singleton")


@final
@dataclass(frozen=True, kw_only=True)
class Key:
    """The fields of a sample.

    Attributes:
        form: The structure: `single`, `tuple`, `dict`, or `both` for `(list, dict)`.
        positional: Dotted paths of the values without a name.
        named: Pairs of (dotted path, argument name).
    """

    form: Form
    positional: tuple[str, ...] = ()
    named: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, key: Any) -> Key:
        """Read a key as users write it.

        Args:
            key: `"x"`, `("x", "y")`, `{"field": "argument"}`, or `(["x"], {"field": "argument"})`.

        Raises:
            ParameterError: Anything else; `field` is `key`.
        """
        if isinstance(key, Key):
            return key
        if isinstance(key, str):
            return cls(form="single", positional=(_path(key),))
        if isinstance(key, Mapping):
            return cls(form="dict", named=_named(key))
        if not isinstance(key, Sequence) or isinstance(key, bytes) or not key:
            raise _refused(key)
        if len(key) == 2 and isinstance(key[1], Mapping):
            first = [key[0]] if isinstance(key[0], str) else key[0]
            if not isinstance(first, Sequence) or isinstance(first, bytes):
                raise _refused(key)
            return cls(form="both", positional=tuple(map(_path, first)), named=_named(key[1]))
        return cls(form="tuple", positional=tuple(map(_path, key)))

    @property
    def fields(self) -> tuple[str, ...]:
        """The path of every value of a sample, in order; a path can occur twice."""
        return (*self.positional, *(path for path, _ in self.named))

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths to read, each once, in the order of the sample."""
        return tuple(dict.fromkeys(self.fields))

    @property
    def projection(self) -> dict[str, int]:
        """The MongoDB projection that reads `_id` and the paths, without paths inside other paths."""
        paths = sorted(set(self.paths) - {"_id"})
        outer = [p for p in paths if not any(p.startswith(q + ".") for q in [*paths, "_id"])]
        return {"_id": 1, **dict.fromkeys(outer, 1)}

    def arrange(self, value: Callable[[str], Any]) -> Any:
        """A sample or a batch: the structure, filled by `value(path)`."""
        named = {argument: value(path) for path, argument in self.named}
        if self.form == "single":
            return value(self.positional[0])
        if self.form == "dict":
            return named
        values = [value(path) for path in self.positional]
        return tuple(values) if self.form == "tuple" else (values, named)

    def arrange_parts(self, values: Sequence[Any]) -> Any:
        """A sample: the structure, filled by as many values as it has `fields`, in their order."""
        count = len(self.positional)
        named = {argument: value for (_, argument), value in zip(self.named, values[count:], strict=True)}
        if self.form == "single":
            return values[0]
        if self.form == "dict":
            return named
        return tuple(values) if self.form == "tuple" else (list(values[:count]), named)

    def samples(self, values: Mapping[str, Sequence[Any]]) -> list[Any]:
        """Samples, of the values of each path in as many documents."""
        positional = [values[path] for path in self.positional]
        if self.form == "single":
            return list(positional[0])
        if self.form == "tuple":
            return list(zip(*positional, strict=True))
        arguments = [argument for _, argument in self.named]
        named = zip(*(values[path] for path, _ in self.named), strict=True)
        dicts = [dict(zip(arguments, row, strict=True)) for row in named]
        if self.form == "dict":
            return dicts
        rows = zip(*positional, strict=True) if positional else ((),) * len(dicts)
        return [(list(row), last) for row, last in zip(rows, dicts, strict=True)]

    def names(self) -> tuple[str, ...]:
        """What values are called where they go by name: the argument, else the last part of the path."""
        return (*(p.rpartition(".")[2] for p in self.positional), *(argument for _, argument in self.named))


_DTYPES: Final = frozenset({"float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"})


def check_defaults(defaults: Any, paths: Sequence[str]) -> None:
    """Refuse defaults of fields that are not read, and what no document could hold. Raises: ParameterError."""
    if defaults is None:
        return
    if not isinstance(defaults, Mapping):
        raise ParameterError('defaults must be a dict such as {"age": 0.0}, or None', field="defaults")
    for path, value in defaults.items():
        if path not in paths:
            raise ParameterError(
                f"defaults names {path!r}, which is no field of the key: {', '.join(paths)}", field="defaults"
            )
        if not _is_plain(value):
            raise ParameterError(
                f"defaults[{path!r}]={value!r}: a number, a boolean, text, or a list of them", field="defaults"
            )


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, list) else isinstance(value, bool | int | float | str)


def check_dtypes(dtypes: Any, paths: Sequence[str]) -> None:
    """Refuse dtypes of fields that are not read, or that no batch can have. Raises: ParameterError."""
    if dtypes is None:
        return
    if not isinstance(dtypes, Mapping):
        raise ParameterError('dtypes must be a dict such as {"x": "float32"}, or None', field="dtypes")
    for path, dtype in dtypes.items():
        if path not in paths:
            raise ParameterError(
                f"dtypes names {path!r}, which is no field of the key: {', '.join(paths)}", field="dtypes"
            )
        if dtype not in _DTYPES:
            raise ParameterError(
                f"dtypes[{path!r}]={dtype!r}: one of {', '.join(sorted(_DTYPES))}", field="dtypes"
            )


def check_sample_weight(path: Any) -> None:
    """Refuse what is no field of a document. Raises: ParameterError."""
    if path is not None and (not isinstance(path, str) or not path):
        raise ParameterError(
            f"sample_weight={path!r}: the name of a field with the weight of a document, or None",
            field="sample_weight",
        )


def weighted_key(key: Any, weight: str | None) -> Key:
    """A key of the fields that are read for a key and the weight of a document."""
    parsed = Key.parse(key)
    return parsed if weight is None else Key.parse((*parsed.paths, weight))


def check_on_bad_document(value: Any) -> None:
    """Refuse what cannot be done with a document that does not fit. Raises: ParameterError."""
    if value not in ("raise", "skip"):
        raise ParameterError(
            f"on_bad_document={value!r}: 'raise' ends with an error that names the document, 'skip' leaves it out",
            field="on_bad_document",
        )


def check_signature(signature: Any) -> None:
    """Refuse a signature that does not exist. Raises: SignatureError."""
    if signature not in SIGNATURES:
        raise SignatureError(f"signature {signature!r}: one of {', '.join(SIGNATURES)}", field="signature")


def _named(key: Mapping[Any, Any]) -> tuple[tuple[str, str], ...]:
    pairs = tuple((_path(path), argument) for path, argument in key.items())
    arguments = [argument for _, argument in pairs]
    if not pairs:
        raise ParameterError(
            'key has an empty dict; a dict names the parts that go by name, the target with them: {"x": "input", '
            '"y": "target"}, or (["x"], {"y": "target"})',
            field="key",
        )
    if not all(isinstance(a, str) and a for a in arguments) or len(set(arguments)) < len(pairs):
        raise ParameterError(
            f"key {dict(key)!r}: a dict maps each field to an argument name of its own; "
            'write {"field": "argument"}',
            field="key",
        )
    return pairs


def _path(path: Any) -> str:
    bad = not isinstance(path, str) or any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in path)
    if bad or any(not part or part.startswith("$") for part in path.split(".")):
        raise _refused(path)
    return str(path)


def _refused(key: Any) -> ParameterError:
    return ParameterError(
        f"key {key!r} is not understood; "
        'write "x", ("x", "y"), {"field": "argument"} or (["x"], {"field": "argument"})',
        field="key",
    )


def sample_caller(function: Callable[..., Any], key: Key, signature: str) -> Callable[[Any], Any]:
    """What calls `function` with a sample, which goes in by `signature`.

    Raises:
        SignatureError: No such signature; or, of what is returned, the function does not take what it gives.
    """
    check_signature(signature)
    split = _splitter(key, signature)

    def call(sample: Any) -> Any:
        positional, named = split(sample)
        try:
            return function(*positional, **named)
        except TypeError as error:
            takes = _unbound(function, positional, named)
            if not takes:
                raise
            raise SignatureError(
                f"transform takes {takes}, and signature {signature!r} gives it {len(positional)} argument(s)"
                f"{''.join(f', {name}=' for name in named)}; the key has {list(key.names())}",
                field="transform",
            ) from error

    return call


def _splitter(key: Key, signature: str) -> Callable[[Any], tuple[Sequence[Any], Mapping[str, Any]]]:
    """What gives the positional and the named arguments that a signature makes of a sample."""
    if signature == "singleton" or (key.form == "single" and signature != "**kwargs"):
        return lambda sample: ((sample,), {})
    if key.form == "tuple" and signature != "**kwargs":
        return lambda sample: (sample, {})
    if key.form == "dict" and signature != "*args":
        return lambda sample: ((), sample)
    if signature == "*args,**kwargs":
        return lambda sample: sample
    names = key.names()

    def values(sample: Any) -> Sequence[Any]:
        positional, named = _arguments(sample, key)
        return [*positional, *named.values()]

    if signature == "*args":
        return lambda sample: (values(sample), {})
    return lambda sample: ((), dict(zip(names, values(sample), strict=True)))


def _unbound(function: Callable[..., Any], positional: Sequence[Any], named: Mapping[str, Any]) -> str:
    """The parameters of a function that cannot be called so; empty where it can be, or nothing is known."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return ""
    try:
        signature.bind(*positional, **named)
    except TypeError:
        return f"({', '.join(signature.parameters)})"
    return ""


def _arguments(sample: Any, key: Key) -> tuple[Sequence[Any], Mapping[str, Any]]:
    if key.form == "single":
        return [sample], {}
    if key.form == "tuple":
        return sample, {}
    return ([], sample) if key.form == "dict" else sample
