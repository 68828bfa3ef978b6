"""What all commands share: options, opening the database, errors, and printing tables and JSON.

Guarantees: a password in an address is never printed. Times are UTC in ISO 8601. JSON is MongoDB's relaxed
extended JSON, which `bson.json_util.loads` reads back as it was stored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from bson import json_util
from rich.console import Console
from rich.table import Table

from mongotorch.datalayer import Datalayer
from mongotorch.errors import MongotorchError
from mongotorch.mongo.error_translation import redact

Uri = Annotated[str | None, typer.Option(help="The database; else MONGOTORCH_URI, else the embedded server.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_JSON = json_util.JSONOptions(json_mode=json_util.JSONMode.RELAXED)


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Print a `MongotorchError` as one line, and exit with code 1."""
    try:
        yield
    except MongotorchError as error:
        typer.echo(f"{type(error).__name__}: {error.message}", err=True)
        raise typer.Exit(1) from None


@contextlib.contextmanager
def opened(uri: str | None) -> Iterator[Datalayer]:
    """The database of an address; a `MongotorchError` is printed as one line."""
    with errors(), Datalayer.connect(uri) as db:
        yield db


def described(db: Datalayer) -> str:
    """The database for people: its address without a password, and the kind of server."""
    kinds = {"mongomock": "in the memory of this process", "embedded": "the embedded MongoDB server"}
    return f"{redact(db.uri)} ({kinds.get(db.uri.partition(':')[0], 'a MongoDB server')})"


def time_of(text: str) -> datetime:
    """The time of a text in ISO 8601, in UTC unless it has a zone; a date alone is midnight."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is no time such as 2026-05-03T12:00 or 2026-05-03T12:00+02:00"
        ) from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def iso(moment: datetime | None) -> str:
    """A time in UTC as text, with milliseconds only if it has some; the empty text for None."""
    if moment is None:
        return ""
    utc = moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment
    return utc.isoformat(timespec="milliseconds" if utc.microsecond else "seconds") + "Z"


def print_table(columns: Iterable[str], rows: Iterable[Iterable[Any]], *, whole: Iterable[str] = ()) -> None:
    """Print a table with headings.

    Args:
        columns: The headings.
        rows: The cells; values other than text are printed by `str`.
        whole: The headings of the columns that are not wrapped.
    """
    table = Table()
    unbroken = set(whole)
    for column in columns:
        table.add_column(column, no_wrap=column in unbroken, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(markup=False, highlight=False).print(table)


def print_pairs(title: str, rows: Iterable[tuple[str, Any]]) -> None:
    """Print a table of names and values."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows:
        table.add_row(name, str(value))
    Console(markup=False).print(table)


def print_value(value: Any, *, as_json: bool) -> None:
    """Print a dataclass field by field."""
    fields = dataclasses.asdict(value)
    if as_json:
        print_json(fields)
        return
    rows = [
        (name, "\n".join(map(str, part)) if isinstance(part, tuple) else part) for name, part in fields.items()
    ]
    print_pairs(type(value).__name__.lower(), rows)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print plain values and BSON types as JSON; without an indent on one line."""
    typer.echo(json.dumps(json.loads(json_util.dumps(value, json_options=_JSON)), indent=indent))
