"""The command `mongotorch`: the demo, what there is, and what became of the runs.

Always: tables where people read, `--json` where machines do; an error of ours is one line and exit code 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from bson import json_util
from rich.console import Console
from rich.table import Column, Table

from mongotorch._version import __version__
from mongotorch.datalayer import Datalayer
from mongotorch.errors import EmbeddedServerError, MongotorchError
from mongotorch.run import Worker, run_pool
from mongotorch.settings import read_settings
from mongotorch.store import redact

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Uri = Annotated[str | None, typer.Option(help="The database; else MONGOTORCH_URI, else the embedded server.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_JSON = json_util.JSONOptions(json_mode=json_util.JSONMode.RELAXED)
_ENDED = {"succeeded": "succeeded", "failed": "failed", "cancelled": "was cancelled"}


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Train PyTorch models where the data lives."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def demo(uri: Uri = None, steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 600) -> None:
    """Train on handwritten digits out of the database, and load the model in another process."""
    from mongotorch.demo import run_demo

    console = Console()
    with _errors(), _open_anything(uri, console) as db:
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
    _print_pairs(console, "mongotorch demo", rows)


@app.command()
def show(
    type_id: Annotated[str | None, typer.Argument(help="model, trainer, metric, validation, dataset")] = None,
    identifier: Annotated[str | None, typer.Argument()] = None,
    version: Annotated[int | None, typer.Argument()] = None,
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """What there is: kinds, identifiers, versions, or one version's whole document."""
    with _errors(), Datalayer.connect(uri) as db:
        found = db.show(type_id, identifier, version)
    if as_json or isinstance(found, dict):
        _print_json(found)
    else:
        for name in found:
            typer.echo(name)


@app.command()
def jobs(
    status: Annotated[str | None, typer.Option(help="queued, running, succeeded, failed or cancelled")] = None,
    limit: Annotated[int, typer.Option(help="The most.")] = 20,
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """The runs, the newest first."""
    with _errors(), Datalayer.connect(uri) as db:
        records = [job.record for job in db.jobs(status=status, limit=limit)]
    if as_json:
        _print_json(records)
        return
    table = Table(Column("job", no_wrap=True), "component", "status", "step", "samples/s", "left", "error")
    for record in records:
        progress, error = record.get("progress") or {}, record.get("error") or {}
        table.add_row(
            record["_id"],
            f"{record['type_id']} {record['identifier']}",
            record["status"],
            str(progress.get("step", "")),
            str(progress.get("samples_per_s", "")),
            f"{progress['left_s']:.0f} s" if "left_s" in progress and record["status"] == "running" else "",
            str(error.get("type", "")),
        )
    Console().print(table)


@app.command()
def job(uuid: str, uri: Uri = None, as_json: AsJson = False) -> None:
    """One run: parameters, environment, progress, and the error with its traceback."""
    with _errors(), Datalayer.connect(uri) as db:
        record = db.job(uuid).record
    if as_json:
        _print_json(record)
        return
    error = record.pop("error", None) or {}
    _print_pairs(Console(), f"job {uuid}", [(key, value) for key, value in record.items() if value is not None])
    if error:
        typer.echo(error.get("traceback") or f"{error.get('type')}: {error.get('message')}")


@app.command()
def cancel(uuid: str, uri: Uri = None, as_json: AsJson = False) -> None:
    """Ask a run to stop at its next step, and publish nothing; exit code 1 where it had ended already."""
    with _errors(), Datalayer.connect(uri) as db:
        run = db.job(uuid)
        done, status = run.cancel(), run.status
    if as_json:
        _print_json({"uuid": uuid, "cancelled": done, "status": status})
    else:
        typer.echo(f"job {uuid} is cancelled" if done else f"job {uuid} had ended already: it {_ENDED[status]}")
    raise typer.Exit(0 if done else 1)


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option(help="Only say what would be collected.")] = False,
    grace_s: Annotated[float, typer.Option(help="For how long it was unreached, in seconds.")] = 3600.0,
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Collect what no component, checkpoint or running job reaches."""
    with _errors(), Datalayer.connect(uri) as db:
        _print_value(db.gc(dry_run, grace_s=grace_s), as_json=as_json)


@app.command()
def verify(uri: Uri = None, as_json: AsJson = False) -> None:
    """Hash every blob and check every signature; exit code 1 where something is broken."""
    with _errors(), Datalayer.connect(uri) as db:
        found = db.verify()
    _print_value(found, as_json=as_json)
    raise typer.Exit(1 if found.problems else 0)


@app.command()
def worker(
    once: Annotated[bool, typer.Option(help="Perform one job, if there is one, and end.")] = False,
    until_idle: Annotated[bool, typer.Option(help="End when no job waits.")] = False,
    concurrency: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    uri: Uri = None,
) -> None:
    """Work the queue: SIGTERM checkpoints the run and hands it back, to be resumed by another worker."""
    if concurrency > 1:
        command = [sys.executable, "-m", "mongotorch", "worker"]
        command += ["--once"] * once + ["--until-idle"] * until_idle
        address = {} if uri is None else {"MONGOTORCH_URI": uri}
        raise typer.Exit(
            run_pool(
                command,
                count=concurrency,
                environment={**os.environ, **address},
                again=not (once or until_idle),
            )
        )
    with _errors(), Datalayer.connect(uri) as db:
        typer.echo(f"working on {_said(db)}")
        done = int(Worker(db).once()) if once else Worker(db).run(until_idle=until_idle)
    typer.echo(f"{done} job(s) performed")


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except MongotorchError as error:
        typer.echo(f"{type(error).__name__}: {error.message}", err=True)
        raise typer.Exit(1) from None


@contextlib.contextmanager
def _open_anything(uri: str | None, console: Console) -> Iterator[Datalayer]:
    """The database that was named, else the embedded server, else memory; says which."""
    try:
        db = Datalayer.connect(uri)
    except EmbeddedServerError as error:
        if uri or read_settings().uri:
            raise
        console.print(f"[yellow]{error.message}[/]", highlight=False)
        db = Datalayer.connect("mongomock://demo")
    with db:
        typer.echo(f"database: {_said(db)}")
        yield db


def _said(db: Datalayer) -> str:
    """Which database it is, for people: without a password."""
    kinds = {"mongomock": "in the memory of this process", "embedded": "the embedded MongoDB server"}
    return f"{redact(db.uri)} ({kinds.get(db.uri.partition(':')[0], 'a MongoDB server')})"


def _print_pairs(console: Console, title: str, rows: list[tuple[str, Any]]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows:
        table.add_row(name, str(value))
    console.print(table)


def _print_value(value: Any, *, as_json: bool) -> None:
    said = dataclasses.asdict(value)
    if as_json:
        _print_json(said)
        return
    rows = [(name, "\n".join(map(str, part)) if isinstance(part, tuple) else part) for name, part in said.items()]
    _print_pairs(Console(), type(value).__name__.lower(), rows)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(json.loads(json_util.dumps(value, json_options=_JSON)), indent=2))
