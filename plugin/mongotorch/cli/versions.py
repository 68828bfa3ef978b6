"""The commands of what is stored and which version is live.

`show`, `promote`, `rollback`, `history`, `diff`, `gc`, `verify`. None of them unpickles anything.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from mongotorch.cli.output import AsJson, Uri, iso, opened, print_json, print_table, print_value, time_of
from mongotorch.store import LIVE, Move

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
    """What is stored: kinds, identifiers, versions, or one version's whole document."""
    with opened(uri) as db:
        found = db.show(type_id, identifier, version)
    if as_json or isinstance(found, dict):
        print_json(found)
    else:
        for name in found:
            typer.echo(name)


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
    grace_s: Annotated[float, typer.Option(help="Seconds for which it must have been unreferenced.")] = 3600.0,
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
