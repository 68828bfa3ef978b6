"""The command `demo`: trains on handwritten digits in whichever database it finds, and says which that is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console

from mongotorch.cli.output import Uri, described, errors, print_pairs
from mongotorch.datalayer import Datalayer
from mongotorch.errors import EmbeddedServerError
from mongotorch.settings import read_settings


def demo(uri: Uri = None, steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 600) -> None:
    """Train on handwritten digits out of the database, and load the model in another process."""
    from mongotorch.demo.digits import run_demo

    with errors(), _open_anything(uri) as db:
        result = run_demo(db, steps=steps)
    rows: list[tuple[str, Any]] = [
        ("documents", result.documents),
        ("steps", result.steps),
        ("samples per second", f"{result.samples_per_s:,.0f}"),
        ("validation objective", f"{result.objective:.4f}"),
        ("validation accuracy", f"{result.accuracy:.4f}"),
        ("published", f"model demo-digits, version {result.version}"),
        ("uuid", result.uuid),
    ]
    if result.second_process is None:
        rows += [("another process", "not on mongomock, which lives in this process alone")]
    else:
        rows += [
            ("another process", f"pid {result.second_process['pid']}"),
            ("  accuracy, loaded by identifier", f"{result.second_process['identifier']:.4f}"),
            ("  accuracy, loaded by uuid", f"{result.second_process['uuid']:.4f}"),
        ]
    print_pairs("mongotorch demo", rows)


@contextlib.contextmanager
def _open_anything(uri: str | None) -> Iterator[Datalayer]:
    """The database of the address, else the embedded server, else memory; prints which it is."""
    try:
        db = Datalayer.connect(uri)
    except EmbeddedServerError as error:
        settings = read_settings()
        if uri or settings.uri or settings.uri_file:
            raise
        Console().print(f"[yellow]{error.message}[/]", highlight=False)
        db = Datalayer.connect("mongomock://demo")
    with db:
        typer.echo(f"database: {described(db)}")
        yield db
