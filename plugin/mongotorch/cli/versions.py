"""The commands of which version counts: `promote`, `rollback`, `history`, and `diff` for how two differ.

Always: a move says who made it, when and why, and is never taken out of the history; nothing is unpickled.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer

from mongotorch.cli.output import AsJson, Uri, iso, opened, print_json, print_table, time_of
from mongotorch.store import LIVE, Move

Kind = Annotated[str, typer.Argument(metavar="TYPE", help="The kind: model.")]
Identifier = Annotated[str, typer.Argument(help="The name.")]
Alias = Annotated[str, typer.Option(help="The alias.")]
Why = Annotated[str, typer.Option(help="Why, for the history.")]


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
    """Let an alias name a version: `load` gives it, and what serves the alias goes over to it."""
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
    """Let an alias name again what it named before its newest move; once more, and that is undone."""
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


def _print_move(move: Move, *, as_json: bool) -> None:
    if as_json:
        print_json(move.to_document())
        return
    # The same sentence where it was named before: then it tells since when.
    typer.echo(
        f"{move.alias} of {move.type_id} {move.identifier} is version {_named(move.to_version)} "
        f"since {iso(move.when)} (move {move.n}, by {move.who}; before: {_named(move.from_version)})"
    )


def _named(version: int | None) -> str:
    return "nothing" if version is None else str(version)
