"""The commands of what is stored: `show`, `gc`, `verify`.

Always: nothing that is reached is removed, and nothing that is stored is unpickled.
"""

from __future__ import annotations

from typing import Annotated

import typer

from mongotorch.cli.output import AsJson, Uri, opened, print_json, print_value


def show(
    type_id: Annotated[
        str | None, typer.Argument(help="model, trainer, metric, validation, dataset, schedule")
    ] = None,
    identifier: Annotated[str | None, typer.Argument()] = None,
    version: Annotated[int | None, typer.Argument()] = None,
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """What there is: kinds, identifiers, versions, or one version's whole document."""
    with opened(uri) as db:
        found = db.show(type_id, identifier, version)
    if as_json or isinstance(found, dict):
        print_json(found)
    else:
        for name in found:
            typer.echo(name)


def gc(
    dry_run: Annotated[bool, typer.Option(help="Only say what would be collected.")] = False,
    grace_s: Annotated[float, typer.Option(help="For how long it was unreached, in seconds.")] = 3600.0,
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Collect what no component, checkpoint or running job reaches."""
    with opened(uri) as db:
        print_value(db.gc(dry_run, grace_s=grace_s), as_json=as_json)


def verify(uri: Uri = None, as_json: AsJson = False) -> None:
    """Hash every blob and check every signature; exit code 1 where something is broken."""
    with opened(uri) as db:
        found = db.verify()
    print_value(found, as_json=as_json)
    raise typer.Exit(1 if found.problems else 0)
