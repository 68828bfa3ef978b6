"""What all commands share: options, opening the database, errors, and printing tables and JSON.

On a terminal a table fits the window and shows short uuids, ages and colours; in a pipe it is one line a row
without a frame, with whole uuids and times. Nothing here imports torch or the driver before a database is opened.

Guarantees: a password in an address is never printed. Times are UTC in ISO 8601. JSON is MongoDB's relaxed
extended JSON, which `bson.json_util.loads` reads back as it was stored. A command that only reads makes no
database.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import difflib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from mongotorch.errors import MongotorchError, NotFoundError

if TYPE_CHECKING:
    from rich.text import Text

    from mongotorch.datalayer import Datalayer
    from mongotorch.settings import Settings

Uri = Annotated[str | None, typer.Option(help="The database; else MONGOTORCH_URI, else the embedded server.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SHORT: Final = 8
"""Characters of a uuid that a terminal shows."""
# Typer hands what was given before the command only to commands that take its context.
_before_command: contextvars.ContextVar[str | None] = contextvars.ContextVar("uri", default=None)
_STYLES: Final = {"failed": "red", "running": "cyan", "succeeded": "green", "queued": "yellow", "cancelled": "dim"}
_UNITS: Final = ((86_400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Print a `MongotorchError` with its notes as one line, and exit with code 1."""
    try:
        yield
    except MongotorchError as error:
        text = "; ".join([error.message, *getattr(error, "__notes__", ())])
        typer.echo(f"{type(error).__name__}: {' '.join(text.split())}", err=True)
        raise typer.Exit(1) from None


@contextlib.contextmanager
def opened(uri: str | None, *, writes: bool = False, **given: Any) -> Iterator[Datalayer]:
    """The database of an address; a `MongotorchError` is printed as one line.

    Args:
        uri: The address given behind the command; None is that before it, else the settings'.
        writes: Whether the command may make the database; without it, one that is not there is an error.
        given: Settings that the command has options for.
    """
    with errors():
        address, settings = address_of(uri, writes=writes, **given)
        with _connected(address, settings, writes=writes) as db:
            yield db


def address_of(uri: str | None, *, writes: bool = False, **given: Any) -> tuple[str, Settings]:
    """The address that a command opens, and the settings.

    Args:
        uri: The address given behind the command; None is that before it, else the settings'.
        writes: Whether the command may make the folder of an embedded server.
        given: Settings that the command has options for.

    Raises:
        NotFoundError: There is no such folder.
        SettingError: A setting cannot be used.
    """
    from mongotorch.settings import read_settings

    named = uri or given_before_command()
    settings = read_settings(**given, **({} if named is None else {"uri": named}))
    address = settings.address()
    if not writes:
        _require_folder(address)
    return address, settings


def given_before_command() -> str | None:
    """The `--uri` written before the command; None without."""
    return _before_command.get()


def remember_uri(uri: str | None) -> None:
    """Keep the `--uri` written before the command, or that there was none, for this invocation."""
    _before_command.set(uri)


def _require_folder(address: str) -> None:
    if not address.lower().startswith("embedded:"):
        return
    from mongotorch.mongo.address import parse_uri

    path = parse_uri(address).path
    if path is not None and not (path / "data").is_dir():
        raise NotFoundError(
            f"there is no database in {path}, and none was made; name one with --uri or MONGOTORCH_URI, or go to "
            "the folder where it is"
        )


@contextlib.contextmanager
def _connected(address: str, settings: Settings, *, writes: bool) -> Iterator[Datalayer]:
    from mongotorch.datalayer import Datalayer
    from mongotorch.mongo.connection import open_address
    from mongotorch.mongo.driver_errors import driver_errors, redact

    with open_address(address, settings) as connection:
        if not writes and not address.lower().startswith("mongomock:"):
            with driver_errors("looking for the database"):
                names = connection.database.list_collection_names(authorizedCollections=True)
            if not any(name.startswith("mt.") for name in names):
                raise NotFoundError(
                    f"nothing of mongotorch is in the database {connection.database.name!r} of "
                    f"{redact(connection.uri)}, and nothing was made; apply a trainer to it first, or name "
                    "another with --uri"
                )
        yield Datalayer(connection, settings)


def described(db: Datalayer) -> str:
    """The database for people: its address without a password, and the kind of server."""
    from mongotorch.mongo.driver_errors import redact

    kinds = {"mongomock": "in the memory of this process", "embedded": "the embedded MongoDB server"}
    return f"{redact(db.uri)} ({kinds.get(db.uri.partition(':')[0], 'a MongoDB server')})"


def one_of(what: str, given: str, known: Iterable[str]) -> str:
    """What was given, if it is known.

    Args:
        what: What it is, for the error.
        given: What was given.
        known: What there is.

    Raises:
        NotFoundError: It is not; the error names what is like it.
    """
    names = list(known)
    if given in names:
        return given
    raise NotFoundError(f"no {what} {given!r}; {like(given, names)}")


def like(given: str, names: Sequence[str]) -> str:
    """Which of these names was meant, or the first of them, as the end of a sentence."""
    found = difflib.get_close_matches(given, names, n=1)
    there = f"there are {', '.join(sorted(names)[:10])}" if names else "there is none"
    return f"did you mean {found[0]!r}?" if found else there


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


def is_terminal() -> bool:
    """Whether a person looks at what is printed."""
    return sys.stdout.isatty()


def short(uuid: str | None) -> str:
    """A uuid as a table shows it: its first characters on a terminal, the whole in a pipe."""
    return "" if uuid is None else uuid[:SHORT] if is_terminal() else uuid


def when(moment: datetime | None) -> str:
    """A time as a table shows it: how long ago on a terminal, the time itself in a pipe."""
    if moment is None or not is_terminal():
        return iso(moment)
    now = datetime.now(UTC)
    then = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    ago_s = (now - then).total_seconds()
    return f"{duration(ago_s)} ago" if ago_s >= 0 else f"in {duration(-ago_s)}"


def duration(seconds: float) -> str:
    """A time span in its largest unit: `42 s`, `3 min`, `5 h`, `2 d`."""
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return "0 s"


def size(nbytes: float) -> str:
    """A number of bytes in its largest unit: `12 bytes`, `3.4 MB`."""
    for unit in ("bytes", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} GB"


def numbers(values: Any) -> str:
    """Measured values in one line."""
    found = values.items() if hasattr(values, "items") else ()
    return ", ".join(f"{name} {value:.4g}" for name, value in found if isinstance(value, int | float))


def print_table(columns: Sequence[str], rows: Iterable[Iterable[Any]], *, whole: Iterable[str] = ()) -> None:
    """Print a table with headings: on a terminal as wide as it is, in a pipe one line a row.

    Args:
        columns: The headings.
        rows: The cells; values other than text are printed by `str`.
        whole: The headings of the columns that are not wrapped on a terminal.
    """
    cells = [[" ".join(str(cell).split()) for cell in row] for row in rows]
    if not is_terminal():
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        for row in [list(columns), *cells]:
            line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            typer.echo(line.rstrip())
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    unbroken = set(whole)
    for column in columns:
        table.add_column(column, no_wrap=column in unbroken, overflow="fold" if column in unbroken else "ellipsis")
    for row in cells:
        table.add_row(*map(_styled, row))
    Console(markup=False, highlight=False).print(table)


def _styled(cell: str) -> Text:
    from rich.text import Text

    return Text(cell, style=_STYLES.get(cell, ""))


def print_pairs(title: str, rows: Iterable[tuple[str, Any]]) -> None:
    """Print a table of names and values."""
    pairs = [(name, str(value)) for name, value in rows]
    if not is_terminal():
        width = max((len(name) for name, _ in pairs), default=0)
        typer.echo(title)
        for name, value in pairs:
            for n, line in enumerate(value.splitlines() or [""]):
                typer.echo(f"  {'' if n else name:<{width}}  {line}".rstrip())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in pairs:
        table.add_row(name, _styled(value))
    Console(markup=False).print(table)


def print_value(value: Any, *, as_json: bool) -> None:
    """Print a dataclass field by field."""
    fields = dataclasses.asdict(value)
    if as_json:
        print_json(fields)
        return
    rows = [
        (name, "\n".join(map(str, part)) or "none" if isinstance(part, tuple) else part)
        for name, part in fields.items()
    ]
    print_pairs(type(value).__name__.lower(), rows)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print plain values and BSON types as JSON; without an indent on one line."""
    from bson import json_util

    options = json_util.JSONOptions(json_mode=json_util.JSONMode.RELAXED)
    typer.echo(json.dumps(json.loads(json_util.dumps(value, json_options=options)), indent=indent))
