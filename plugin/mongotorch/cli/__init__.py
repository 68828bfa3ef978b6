"""The command `mongotorch`: training, what is stored, jobs, schedules, and versions.

Every command is one call of the `Datalayer`. It prints tables for people and, with `--json`, JSON for programs; an
error of mongotorch is one line and exit code 1. torch is imported by the commands that open a database.
"""

from __future__ import annotations

from typing import Annotated

import typer

from mongotorch._version import __version__
from mongotorch.cli import bundles, dashboard, demo, doctor, jobs, lineage, metrics, predict, schedules, versions
from mongotorch.cli.output import Uri, remember_uri

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    uri: Uri = None,
) -> None:
    """Train PyTorch models where the data lives."""
    remember_uri(uri)
    if version:
        typer.echo(__version__)
        raise typer.Exit


# In the order in which the help lists them.
for _command in (
    *(demo.demo, jobs.train, jobs.jobs, jobs.job, jobs.watch, jobs.logs, jobs.stop, jobs.cancel),
    *(jobs.worker, jobs.run_job),
    *(metrics.metrics, metrics.mirror, dashboard.dashboard),
    *(versions.show, versions.compare, predict.predict, versions.promote, versions.rollback, versions.history),
    *(versions.diff, lineage.lineage, bundles.export),
    *(versions.gc, versions.verify, versions.resign, doctor.doctor),
):
    app.command()(_command)
    if _command is bundles.export:
        app.command("import")(bundles.import_)
app.add_typer(schedules.app, name="schedule")
