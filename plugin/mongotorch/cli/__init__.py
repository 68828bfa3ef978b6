"""The command `mongotorch`: training, what is stored, jobs, schedules, and versions.

Every command is one call of the `Datalayer`. It prints tables for people and, with `--json`, JSON for programs; an
error of mongotorch is one line and exit code 1.
"""

from __future__ import annotations

from typing import Annotated

import typer

from mongotorch._version import __version__
from mongotorch.cli import dashboard, demo, jobs, lineage, metrics, schedules, versions

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Train PyTorch models where the data lives."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


# In the order in which the help lists them.
for _command in (
    *(demo.demo, versions.show, jobs.jobs, jobs.job, jobs.cancel, jobs.stop, jobs.worker),
    *(metrics.metrics, metrics.mirror, dashboard.dashboard),
    *(versions.promote, versions.rollback, versions.history, versions.diff, lineage.lineage),
    *(versions.gc, versions.verify, versions.resign),
):
    app.command()(_command)
app.add_typer(schedules.app, name="schedule")
