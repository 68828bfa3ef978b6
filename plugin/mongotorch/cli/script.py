"""Runs the script that a command is given, and takes from it what the command asks for.

Guarantees: the script runs before a database is opened, so that a wrong name makes none; an error in the script is
shown as Python shows it, from the script's first line on.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, final

import typer

from mongotorch.cli.output import like

if TYPE_CHECKING:
    from mongotorch.component import Component
    from mongotorch.datalayer import Datalayer


@final
class Script:
    """A script of a user that has run.

    Args:
        source: `FILE.py`, or `FILE.py:NAME` for one variable of several.
    """

    def __init__(self, source: str) -> None:
        self._file, _, name = source.partition(":")
        self._values = vars(_run(self._file))
        self._name = name or self._only()
        if self._name not in self._values:
            _refuse(f"{self._file} defines no {self._name!r}; {like(self._name, self._own())}")

    def trainer(self, db: Datalayer) -> Component:
        """The trainer of that name, or the only one; what a function of that name returns for the datalayer."""
        from mongotorch.component import Component

        found = self._values[self._name]
        if callable(found) and not isinstance(found, Component):
            found = _guarded(functools.partial(found, db))
        if not isinstance(found, Component):
            _refuse(f"{self._name!r} of {self._file} is of type {type(found).__name__}, not a trainer")
        return found

    def _own(self) -> list[str]:
        """The names of what may be a trainer, or may make one."""
        from mongotorch.component import Component

        own = [
            key for key, value in self._values.items() if isinstance(value, Component) or inspect.isfunction(value)
        ]
        return [key for key in own if not key.startswith("_")]

    def _only(self) -> str:
        from mongotorch.component import Component

        runs = [
            name
            for name, value in self._values.items()
            if isinstance(value, Component) and hasattr(value, "select")
        ]
        if len(runs) != 1:
            there = f"has the trainers {', '.join(runs)}" if runs else "has no trainer"
            makers = [] if runs else self._own()
            known = f"; its functions are {', '.join(makers)}" if makers else ""
            _refuse(f"{self._file} {there}; say which: {self._file}:NAME{known}")
        return runs[0]


def _run(file: str) -> ModuleType:
    path = Path(file)
    if not path.is_file():
        _refuse(f"there is no file {file!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        _refuse(f"{file!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # so that what is stored of its functions names the module
    sys.path.insert(0, str(path.parent.absolute()))
    loader = spec.loader
    _guarded(functools.partial(loader.exec_module, module))
    return module


def _guarded(run: Callable[[], Any]) -> Any:
    """What a function of the user gives; an error in it is shown without what called it, and ends the command."""
    try:
        return run()
    except Exception as error:  # noqa: BLE001 - the user's own code
        own = error.__traceback__
        while own is not None and (own.tb_frame.f_globals is globals() or _is_import(own)):
            own = own.tb_next
        typer.echo("".join(traceback.format_exception(type(error), error, own)).rstrip(), err=True)
        raise typer.Exit(1) from None


def _is_import(trace: TracebackType) -> bool:
    return trace.tb_frame.f_code.co_filename.startswith("<frozen importlib")


def _refuse(why: str) -> NoReturn:
    typer.echo(f"Error: {why}", err=True)
    raise typer.Exit(2)
