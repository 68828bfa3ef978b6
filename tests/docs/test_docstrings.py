"""Every public name has a docstring, and what it says of arguments and errors is so."""

from __future__ import annotations

import builtins
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mongotorch
from mongotorch import errors

SCRIPT = Path(__file__).parents[2] / "docs" / "make_reference.py"
MOST_WITHOUT_ARGS = 3  # arguments that a sentence can explain


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("make_reference", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = _load()


def _entries() -> Iterator[tuple[str, Any, str]]:
    """Each public name and each of its members: where it is, what is called, what is said of it."""
    for name, value in reference.public().items():
        # A class without a docstring of its own would show that of its base.
        yield name, value, (vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__) or ""
        for member, found in reference.members(value) if inspect.isclass(value) else ():
            function = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
            yield f"{name}.{member}", function, inspect.getdoc(function) or ""


def _listed(text: str, section: str) -> list[str]:
    """The names that a section of a docstring explains."""
    lines = iter(inspect.cleandoc(text).splitlines())
    names: list[str] = []
    for line in lines:
        if line == f"{section}:":
            for entry in lines:
                if not entry.startswith("    "):
                    break
                if found := reference.ENTRY.fullmatch(entry):
                    names += [name.strip(" *") for name in found[1].split(",")]
    return names


def _arguments(value: Any) -> list[str]:
    if inspect.isclass(value) and not reference.has_constructor(value):
        return []
    return [name for name in inspect.signature(value).parameters if name not in {"self", "cls"}]


ENTRIES = list(_entries())


def test_the_reference_shows_every_name_of_the_package() -> None:
    shown = {name for names in reference.shown().values() for name in names}
    assert set(mongotorch.__all__) - {"__version__"} <= shown
    assert {"Datalayer.apply", "Query.sort", "CodecError", "CodecSuite"} <= {where for where, _, _ in ENTRIES}


def test_public_names_are_explained() -> None:
    first = {where: inspect.cleandoc(text).partition("\n")[0] for where, _, text in ENTRIES}
    assert [where for where, line in first.items() if not line] == [], "no docstring"
    signatures = [where for where, line in first.items() if line.startswith(f"{where.rpartition('.')[2]}(")]
    assert signatures == [], "the docstring is a signature"


def test_the_arguments_that_are_explained_are_those_there_are() -> None:
    wrong = {}
    for where, value, text in ENTRIES:
        explained, arguments = _listed(text, "Args") or _listed(text, "Attributes"), _arguments(value)
        expected = arguments and (explained or len(arguments) > MOST_WITHOUT_ARGS)
        if expected and sorted(explained) != sorted(arguments):
            wrong[where] = {"explained": sorted(explained), "arguments": sorted(arguments)}
    assert wrong == {}


def test_the_errors_that_are_named_exist() -> None:
    named = {
        where: _listed(text, "Raises") + re.findall(r"\b[A-Z][A-Za-z]+Error\b", text) for where, _, text in ENTRIES
    }
    unknown = {
        where: [name for name in names if not hasattr(errors, name) and not hasattr(builtins, name)]
        for where, names in named.items()
    }
    assert {where: names for where, names in unknown.items() if names} == {}
