"""The commands `export` and `import`: a version goes through a file into another database."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mongotorch.cli.output import AsJson, Uri, described, one_of, opened, print_json, size

if TYPE_CHECKING:
    from mongotorch.services.versions.bundles import Bundle

_KINDS = ("dataset", "metric", "model", "trainer", "validation")


def export(
    type_id: Annotated[str, typer.Argument(metavar="TYPE", help="The kind: model.")],
    identifier: Annotated[str, typer.Argument(help="The name.")],
    version: Annotated[int | None, typer.Argument(help="The version; without it, the live one.")] = None,
    into: Annotated[
        Path | None, typer.Option(help="The file; without it, IDENTIFIER-VERSION.zip in this folder.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Write over a file that is there.")] = False,
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Write a version into one file: what it refers to, its blobs, and what is known of its run."""
    with opened(uri) as db:
        one_of("kind", type_id, {*_KINDS, *db.show()})
        one_of(type_id, identifier, db.show(type_id))
        if version is None:
            version = db.load(type_id, identifier).version
        bundle = db.export(into or Path(f"{identifier}-{version}.zip"), type_id, identifier, version, force=force)
    if as_json:
        _print_json(bundle)
        return
    counts = f"{bundle.components} components, {bundle.blobs} blobs, {size(bundle.nbytes)}"
    typer.echo(f"{bundle.path}: version {bundle.version} of {bundle.type_id} {bundle.identifier} ({counts})")


def import_(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="What `export` wrote.")],
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Store the version of a file under the next number of its name, once everything in the file is verified."""
    with opened(uri, writes=True) as db:
        bundle, where = db.import_bundle(path), described(db)
    if as_json:
        _print_json(bundle)
        return
    name = f"{bundle.type_id} {bundle.identifier}"
    if bundle.was_there:
        typer.echo(f"{name} of the file is version {bundle.version} here already, in {where}")
    else:
        typer.echo(f"{name} version {bundle.version} in {where}; it was version {bundle.exported_version}")


def _print_json(bundle: Bundle) -> None:
    print_json({**dataclasses.asdict(bundle), "path": str(bundle.path)})
