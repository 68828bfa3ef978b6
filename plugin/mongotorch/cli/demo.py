"""The command `demo`: trains on handwritten digits in whichever database it finds, and says which that is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mongotorch.cli.metrics import curves
from mongotorch.cli.output import Uri, described, errors, given_before_command, print_pairs
from mongotorch.errors import EmbeddedServerError

if TYPE_CHECKING:
    from mongotorch.datalayer import Datalayer

_SHADES = " .:-=+*#%@"


def demo(uri: Uri = None, steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 600) -> None:
    """Train on handwritten digits out of the database, and load the model in another process."""
    try:
        from mongotorch.demo.digits import run_demo
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sklearn":
            raise
        typer.echo("the demo's digits come with scikit-learn: pip install 'mongotorch[demo]'", err=True)
        raise typer.Exit(1) from None
    with errors(), _open_anything(uri or given_before_command()) as db:
        result = run_demo(db, steps=steps)
        curve = curves(db.metrics(result.uuid), "objective", height=8)
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
    typer.echo(f"\n{curve}")
    typer.echo("\npredicted, of documents that it was not trained on (* is wrong):")
    for line in _drawn(result.examples):
        typer.echo(line)
    if result.second_process is not None:
        typer.echo(
            f"\nstored in {result.database}: the digits in demo_digits; the model, its trainer, the job and what "
            "it measured in mt.*\nnext, with the same database:\n"
            "  mongotorch show model demo-digits\n"
            "  mongotorch jobs\n"
            "  mongotorch lineage model demo-digits"
        )


def _drawn(examples: Sequence[tuple[Any, int, int]]) -> list[str]:
    """Images of 8 x 8 numbers from 0 to 1 beside one another, each over what was predicted."""
    rows = ["  ".join("".join(map(_shade, image[n])) for image, _, _ in examples) for n in range(8)]
    under = "  ".join(
        f"{predicted}{'' if predicted == label else f'* ({label})'}".center(16) for _, predicted, label in examples
    )
    return [*rows, under]


def _shade(value: Any) -> str:
    return 2 * _SHADES[round(float(value) * (len(_SHADES) - 1))]


@contextlib.contextmanager
def _open_anything(uri: str | None) -> Iterator[Datalayer]:
    """The database of the address, else the embedded server, else memory; prints which it is."""
    from rich.console import Console

    from mongotorch.datalayer import Datalayer
    from mongotorch.settings import read_settings

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
