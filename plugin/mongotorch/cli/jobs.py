"""The commands of jobs: `jobs`, `job`, `cancel`, `stop`, and `worker`, which runs them."""

from __future__ import annotations

import functools
from typing import Annotated

import typer

from mongotorch.cli.logs import LogFormat, LogLevel, configure_logging, logging_to_stderr
from mongotorch.cli.output import AsJson, Uri, described, opened, print_json, print_pairs, print_table
from mongotorch.worker import Supervisor, Tally, Worker

_ENDED = {"succeeded": "succeeded", "failed": "failed", "cancelled": "was cancelled"}


def jobs(
    status: Annotated[str | None, typer.Option(help="queued, running, succeeded, failed or cancelled")] = None,
    limit: Annotated[int, typer.Option(help="At most so many.")] = 20,
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """The jobs, newest first."""
    with opened(uri) as db:
        records = [job.record for job in db.jobs(status=status, limit=limit)]
    if as_json:
        print_json(records)
        return
    rows = []
    for record in records:
        progress, error = record.get("progress") or {}, record.get("error") or {}
        left = f"{progress['left_s']:.0f} s" if "left_s" in progress and record["status"] == "running" else ""
        cells = (progress.get("step", ""), progress.get("samples_per_s", ""), left, error.get("type", ""))
        rows.append((record["_id"], f"{record['type_id']} {record['identifier']}", record["status"], *cells))
    columns = ("job", "component", "status", "step", "samples/s", "left", "error")
    print_table(columns, rows, whole=["job"])


def job(uuid: str, uri: Uri = None, as_json: AsJson = False) -> None:
    """One job: parameters, environment, progress, and the error with its traceback."""
    with opened(uri) as db:
        record = db.job(uuid).record
    if as_json:
        print_json(record)
        return
    error = record.pop("error", None) or {}
    print_pairs(f"job {uuid}", [(key, value) for key, value in record.items() if value is not None])
    if error:
        typer.echo(error.get("traceback") or f"{error.get('type')}: {error.get('message')}")


def cancel(uuid: str, uri: Uri = None, as_json: AsJson = False) -> None:
    """Make a job stop at its next step and publish nothing; exit code 1 if it had ended already."""
    with opened(uri) as db:
        run = db.job(uuid)
        done, status = run.cancel(), run.status
    if as_json:
        print_json({"uuid": uuid, "cancelled": done, "status": status})
    else:
        typer.echo(f"job {uuid} is cancelled" if done else f"job {uuid} had ended already: it {_ENDED[status]}")
    raise typer.Exit(0 if done else 1)


def stop(uuid: str, uri: Uri = None, as_json: AsJson = False) -> None:
    """Make a job end after its next step and publish the best so far; exit code 1 if it had ended already."""
    with opened(uri) as db:
        run = db.job(uuid)
        done, status = run.stop(), run.status
    if as_json:
        print_json({"uuid": uuid, "stopped": done, "status": status})
    elif not done:
        typer.echo(f"job {uuid} had ended already: it {_ENDED.get(status, 'has published')}")
    elif status == "cancelled":
        typer.echo(f"job {uuid} is cancelled: it had not begun")
    else:
        typer.echo(f"job {uuid} ends after its next step, and publishes the best so far")
    raise typer.Exit(0 if done else 1)


def worker(
    once: Annotated[bool, typer.Option(help="Run one job, if there is one, and end.")] = False,
    until_idle: Annotated[bool, typer.Option(help="End when no schedule is due and no job waits.")] = False,
    concurrency: Annotated[int, typer.Option(min=1, help="Jobs at once, each in a process of its own.")] = 1,
    log_level: Annotated[LogLevel, typer.Option(help="What is logged, on stderr.")] = LogLevel.info,
    log_format: Annotated[
        LogFormat, typer.Option(help="Lines for people, or one JSON object each.")
    ] = LogFormat.text,
    uri: Uri = None,
) -> None:
    """Run queued jobs, watch the documents of schedules, and fire the schedules that are due.

    Any number of workers may run; one of them at a time fires schedules, and each firing is one job.
    At SIGTERM the current run writes a checkpoint and is handed back, to be resumed by another worker.
    With --once and --until-idle the exit code is 1 if an attempt failed.
    """
    configure = functools.partial(configure_logging, log_level.value, log_format.value)
    mode = "once" if once else "until_idle" if until_idle else "forever"
    with logging_to_stderr(log_level.value, log_format.value), opened(uri) as db:
        typer.echo(f"working on {described(db)}")
        if db.uri.startswith("mongomock:"):  # its data is in this process
            alone = Worker(db)
            done = int(alone.once()) if once else alone.run(until_idle=until_idle)
            tally = Tally(done=done, failed=alone.failed)
        else:
            tally = Supervisor(db, count=concurrency, configure=configure).run(mode)
    typer.echo(f"{tally.done} job(s) performed, {tally.failed} failed")
    raise typer.Exit(1 if tally.failed and mode != "forever" else 0)
