"""The commands of what is stored and which version is live.

`show`, `compare`, `promote`, `rollback`, `history`, `diff`, `gc`, `verify`, `resign`. They unpickle nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mongotorch.cli.output import (
    AsJson,
    Uri,
    iso,
    numbers,
    one_of,
    opened,
    print_json,
    print_table,
    print_value,
    short,
    size,
    time_of,
    when,
)

if TYPE_CHECKING:
    from mongotorch.datalayer import Datalayer
    from mongotorch.store import Move

LIVE = "live"
KINDS = ("dataset", "metric", "model", "schedule", "trainer", "validation")
Kind = Annotated[str, typer.Argument(metavar="TYPE", help="The kind: model.")]
Identifier = Annotated[str, typer.Argument(help="The name.")]
Alias = Annotated[str, typer.Option(help="The alias.")]
Why = Annotated[str, typer.Option(help="Why, for the history.")]


def show(
    type_id: Annotated[
        str | None, typer.Argument(help="model, trainer, metric, validation, dataset, schedule")
    ] = None,
    identifier: Annotated[str | None, typer.Argument()] = None,
    version: Annotated[int | None, typer.Argument()] = None,
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """What is stored: kinds, identifiers, the versions of a name, or one version's whole document."""
    with opened(uri) as db:
        if type_id is None:
            _print_names(db.show(), as_json=as_json)
            return
        one_of("kind", type_id, {*KINDS, *db.show()})
        if identifier is None:
            _print_names(db.show(type_id), as_json=as_json)
            return
        one_of(type_id, identifier, db.show(type_id))
        if version is not None:
            print_json(db.show(type_id, identifier, version))
            return
        rows = list(_versions(db, type_id, identifier))
    if as_json:
        print_json(rows)
        return
    columns = ("version", "created", "trained", "live", "steps", "size", "metrics", "uuid")
    print_table(columns, map(_version_row, rows), whole=["version", "uuid"])


def _print_names(names: list[str], *, as_json: bool) -> None:
    if as_json:
        print_json(names)
        return
    for name in names:
        typer.echo(name)


def _versions(db: Datalayer, type_id: str, identifier: str) -> Iterator[dict[str, Any]]:
    """What a person looks for in each version of a name, oldest first."""
    moves = db.history(type_id, identifier)
    live = moves[-1].to_uuid if moves else None
    for version in db.show(type_id, identifier):
        document = db.show(type_id, identifier, version)
        yield {
            "version": version,
            "created": document["created"],
            "trained": document["trained"],
            "live": document["_id"] == live,
            "steps": document.get("steps"),
            "nbytes": _nbytes(document["fields"]),
            "metrics": document.get("metrics") or {},
            "uuid": document["_id"],
        }


def _nbytes(record: Any) -> int:
    """The bytes of the tensors that a record names."""
    if isinstance(record, Mapping):
        storages = record.get("storages")
        own = sum(one.get("nbytes", 0) for one in storages) if isinstance(storages, list) else 0
        return own + sum(map(_nbytes, record.values()))
    return sum(map(_nbytes, record)) if isinstance(record, list) and record and isinstance(record[0], dict) else 0


def _version_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(row["version"]),
        when(row["created"]),
        "yes" if row["trained"] else "no",
        LIVE if row["live"] else "",
        "" if row["steps"] is None else str(row["steps"]),
        size(row["nbytes"]) if row["nbytes"] else "",
        numbers(row["metrics"]),
        short(row["uuid"]),
    )


def compare(
    type_id: Kind,
    identifier: Identifier,
    by: Annotated[str | None, typer.Option(help="The metric to sort by, lowest first; else by version.")] = None,
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """The trained versions of a name side by side: a column for each metric."""
    with opened(uri) as db:
        one_of("kind", type_id, {*KINDS, *db.show()})
        one_of(type_id, identifier, db.show(type_id))
        rows = [row for row in _versions(db, type_id, identifier) if row["trained"]]
        names = sorted({name for row in rows for name in row["metrics"]})
        if by is not None:
            one_of("metric", by, names)
            rows.sort(key=lambda row: row["metrics"].get(by, float("inf")))
    if as_json:
        print_json(rows)
        return
    if not rows:
        typer.echo(f"no version of {type_id} {identifier!r} is trained")
        return
    cells = (
        (
            *(row["version"], when(row["created"]), LIVE if row["live"] else "", row["steps"]),
            *(f"{row['metrics'][name]:.4g}" if name in row["metrics"] else "" for name in names),
        )
        for row in rows
    )
    print_table(("version", "created", "live", "steps", *names), cells, whole=["version"])


def promote(
    type_id: Kind,
    identifier: Identifier,
    version: Annotated[int | None, typer.Argument(help="The version; without it, the newest.")] = None,
    uuid: Annotated[str | None, typer.Option(help="Instead of the version.")] = None,
    alias: Alias = LIVE,
    why: Why = "",
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Point an alias at a version: `load` returns it, and handles of `live` switch to it."""
    with opened(uri) as db:
        move = db.promote(type_id, identifier, version, uuid, alias=alias, why=why)
    _print_move(move, as_json=as_json)


def rollback(
    type_id: Kind,
    identifier: Identifier,
    alias: Alias = LIVE,
    why: Why = "",
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Point an alias back at what it named before; a second rollback undoes the first."""
    with opened(uri) as db:
        move = db.rollback(type_id, identifier, alias=alias, why=why)
    _print_move(move, as_json=as_json)


def history(
    type_id: Kind,
    identifier: Identifier,
    alias: Alias = LIVE,
    at: Annotated[
        datetime | None,
        typer.Option(parser=time_of, metavar="ISO", help="As it stood then: its last move was in force."),
    ] = None,
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Every move of an alias: when, from which version to which, who, and why."""
    with opened(uri) as db:
        moves = db.history(type_id, identifier, alias=alias, at=at)
    if as_json:
        print_json([move.to_document() for move in moves])
        return
    rows = [
        (move.n, iso(move.when), _named(move.from_version), _named(move.to_version), move.who, move.why)
        for move in moves
    ]
    print_table(("n", "when", "from", "to", "who", "why"), rows, whole=["n", "when"])


def diff(
    uuid1: Annotated[str, typer.Argument(help="The earlier version.")],
    uuid2: Annotated[str, typer.Argument(help="The later version.")],
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """How a version differs from another: parameters, measurements, training documents, environment."""
    with opened(uri) as db:
        found = db.diff(uuid1, uuid2)
    if as_json:
        print_json(found.to_document())
    else:
        typer.echo(found)


def gc(
    dry_run: Annotated[bool, typer.Option(help="Only say what would be removed.")] = False,
    grace_s: Annotated[
        float, typer.Option(min=0, help="Seconds for which it must have been unreferenced.")
    ] = 3600.0,
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Remove what no component, checkpoint or running job refers to."""
    with opened(uri) as db:
        print_value(db.gc(dry_run, grace_s=grace_s), as_json=as_json)


def verify(
    repair: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Put back what files of this folder have.")
    ] = None,
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Hash every blob and check every signature; exit code 1 if something is broken."""
    with opened(uri) as db:
        found = db.verify(repair=repair)
    print_value(found, as_json=as_json)
    raise typer.Exit(1 if found.problems else 0)


def resign(uri: Uri = None, as_json: AsJson = False) -> None:
    """Sign with the first key what another accepted key has signed; then the other key can be dropped."""
    with opened(uri) as db:
        count = db.resign()
    if as_json:
        print_json({"signed": count})
    else:
        typer.echo(f"{count} record(s) signed again")


def _print_move(move: Move, *, as_json: bool) -> None:
    if as_json:
        print_json(move.to_document())
        return
    # The same sentence if the alias named that version already: it says since when.
    typer.echo(
        f"{move.alias} of {move.type_id} {move.identifier} is version {_named(move.to_version)} "
        f"since {iso(move.when)} (move {move.n}, by {move.who}; before: {_named(move.from_version)})"
    )


def _named(version: int | None) -> str:
    return "nothing" if version is None else str(version)
