"""What every command prints with, and the options that they share.

Always: a password in an address is never printed; a time is UTC, as ISO 8601 says it; JSON is the relaxed extended
JSON of MongoDB, which `bson.json_util.loads` reads back as it was stored.
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
from mongotorch.mongo.redact import redact

Uri = Annotated[str | None, typer.Option(help="The database; else MONGOTORCH_URI, else the embedded server.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_JSON = json_util.JSONOptions(json_mode=json_util.JSONMode.RELAXED)


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """An error of ours becomes one line, and exit code 1."""
    try:
        yield
    except MongotorchError as error:
        typer.echo(f"{type(error).__name__}: {error.message}", err=True)
        raise typer.Exit(1) from None


@contextlib.contextmanager
def opened(uri: str | None) -> Iterator[Datalayer]:
    """The database that was named; an error of ours becomes one line."""
    with errors(), Datalayer.connect(uri) as db:
        yield db


def said_of(db: Datalayer) -> str:
    """Which database it is, for people: without a password."""
    kinds = {"mongomock": "in the memory of this process", "embedded": "the embedded MongoDB server"}
    return f"{redact(db.uri)} ({kinds.get(db.uri.partition(':')[0], 'a MongoDB server')})"


def time_of(text: str) -> datetime:
    """A time as one types it: ISO 8601, in UTC unless it says another zone; a date alone is its first moment."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is no time such as 2026-05-03T12:00 or 2026-05-03T12:00+02:00"
        ) from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def iso(moment: datetime | None) -> str:
    """A time in UTC for people to read, to the millisecond where it has any; nothing for None."""
    if moment is None:
        return ""
    utc = moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment
    return utc.isoformat(timespec="milliseconds" if utc.microsecond else "seconds") + "Z"


def print_table(columns: Iterable[str], rows: Iterable[Iterable[Any]], *, whole: Iterable[str] = ()) -> None:
    """A table with a line of headings.

    Args:
        columns: The headings.
        rows: The cells; what is no text is printed as Python says it.
        whole: The headings of the columns that are not broken into lines.
    """
    table = Table()
    unbroken = set(whole)
    for column in columns:
        table.add_column(column, no_wrap=column in unbroken, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(markup=False, highlight=False).print(table)


def print_pairs(title: str, rows: Iterable[tuple[str, Any]]) -> None:
    """A table of names and values."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows:
        table.add_row(name, str(value))
    Console(markup=False).print(table)


def print_value(value: Any, *, as_json: bool) -> None:
    """A dataclass, field by field."""
    said = dataclasses.asdict(value)
    if as_json:
        print_json(said)
        return
    rows = [(name, "\n".join(map(str, part)) if isinstance(part, tuple) else part) for name, part in said.items()]
    print_pairs(type(value).__name__.lower(), rows)


def print_json(value: Any) -> None:
    """Plain values, with what BSON knows besides."""
    typer.echo(json.dumps(json.loads(json_util.dumps(value, json_options=_JSON)), indent=2))
