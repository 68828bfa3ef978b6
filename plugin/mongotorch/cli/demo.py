"""The command that shows the main job on real data: `demo`.

Always: it finds a database to run on, and says which; what it trains is published there like any other model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console

from mongotorch.cli.output import Uri, errors, print_pairs, said_of
from mongotorch.datalayer import Datalayer
from mongotorch.errors import EmbeddedServerError
from mongotorch.settings import read_settings


def demo(uri: Uri = None, steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 600) -> None:
    """Train on handwritten digits out of the database, and load the model in another process."""
    from mongotorch.demo.digits import run_demo

    with errors(), _open_anything(uri) as db:
        outcome = run_demo(db, steps=steps)
    rows: list[tuple[str, Any]] = [
        ("documents", outcome.documents),
        ("steps", outcome.steps),
        ("samples per second", f"{outcome.samples_per_s:,.0f}"),
        ("validation objective", f"{outcome.objective:.4f}"),
        ("validation accuracy", f"{outcome.accuracy:.4f}"),
        ("published", f"model demo-digits, version {outcome.version}"),
        ("uuid", outcome.uuid),
    ]
    if outcome.elsewhere is None:
        rows += [("another process", "not on mongomock, which lives in this process alone")]
    else:
        rows += [
            ("another process", f"pid {outcome.elsewhere['pid']}"),
            ("  accuracy, loaded by identifier", f"{outcome.elsewhere['identifier']:.4f}"),
            ("  accuracy, loaded by uuid", f"{outcome.elsewhere['uuid']:.4f}"),
        ]
    print_pairs("mongotorch demo", rows)


@contextlib.contextmanager
def _open_anything(uri: str | None) -> Iterator[Datalayer]:
    """The database that was named, else the embedded server, else memory; says which."""
    try:
        db = Datalayer.connect(uri)
    except EmbeddedServerError as error:
        if uri or read_settings().uri:
            raise
        Console().print(f"[yellow]{error.message}[/]", highlight=False)
        db = Datalayer.connect("mongomock://demo")
    with db:
        typer.echo(f"database: {said_of(db)}")
        yield db
