"""The commands of jobs: `train`, `jobs`, `job`, `watch`, `logs`, `stop`, `cancel`; `worker` runs them."""

from __future__ import annotations

import contextlib
import enum
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mongotorch.cli.logs import LogFormat, LogLevel, configure_logging, logging_to_stderr
from mongotorch.cli.output import (
    AsJson,
    Uri,
    address_of,
    described,
    duration,
    errors,
    iso,
    numbers,
    opened,
    print_json,
    print_pairs,
    print_table,
    short,
    when,
)
from mongotorch.cli.script import Script
from mongotorch.errors import NotFoundError

if TYPE_CHECKING:
    from mongotorch.datalayer import Datalayer

_ENDED = {"succeeded": "succeeded", "failed": "failed", "cancelled": "was cancelled"}
_LOOK_S = 0.5
_INTERRUPTED = 130  # what shells say of a program that Ctrl-C ended


class Status(enum.StrEnum):
    """The states of a job."""

    queued = "queued"
    running = "running"
    succeeded = "succeeded"
    failed = "failed"
    cancelled = "cancelled"


def train(
    source: Annotated[str, typer.Argument(metavar="FILE.py[:NAME]", help="A script, and its trainer's variable.")],
    force: Annotated[bool, typer.Option(help="Train although nothing changed.")] = False,
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Run a script that defines a trainer, apply the trainer, and wait for its run.

    A function of that name is called with the open datalayer, and returns the trainer.
    """
    script = Script(source)
    with opened(uri, writes=True) as db:
        job = db.apply(script.trainer(db), force=force)
        if not as_json:
            typer.echo(f"job {job.uuid} on {described(db)}", err=True)
        model = job.result()
        found = {"job": job.uuid, "identifier": model.identifier, "version": model.version, "uuid": model.uuid}
        measured = db.show(uuid=model.uuid).get("metrics") or {}
    if as_json:
        print_json({**found, "metrics": measured})
    else:
        typer.echo(f"model {model.identifier} version {model.version} ({numbers(measured)})")


def jobs(
    status: Annotated[Status | None, typer.Option(help="Only jobs of this status.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """The jobs, newest first."""
    with opened(uri) as db:
        records = [job.record for job in db.jobs(status=status.value if status else None, limit=limit)]
        where = described(db)
    if as_json:
        print_json(records)
    elif not records:
        typer.echo(f"no {f'{status.value} ' if status else ''}job in {where}")
    else:
        columns = ("job", "component", "status", "step", "rate", "left", "values", "created", "error")
        print_table(columns, map(_row, records), whole=["job", "status"])


def _row(record: Mapping[str, Any]) -> tuple[str, ...]:
    progress, error = record.get("progress") or {}, record.get("error") or {}
    left = duration(progress["left_s"]) if "left_s" in progress and record["status"] == "running" else ""
    rate = f"{progress['samples_per_s']:,.0f}/s" if "samples_per_s" in progress else ""
    return (
        short(record["_id"]),
        f"{record['type_id']} {record['identifier']}",
        record["status"],
        str(progress.get("step", "")),
        rate,
        left,
        numbers(progress.get("values")),
        when(record.get("created")),
        error.get("type", ""),
    )


JobName = Annotated[str, typer.Argument(metavar="JOB", help="Its uuid, or the first characters of it.")]


def job(uuid: JobName, uri: Uri = None, as_json: AsJson = False) -> None:
    """One job: parameters, environment, progress, and the error with its traceback."""
    with opened(uri) as db:
        record = db.job(uuid).record
    if as_json:
        print_json(record)
        return
    error = record.pop("error", None) or {}
    print_pairs(f"job {record['_id']}", [(key, value) for key, value in record.items() if value is not None])
    if error:
        typer.echo(error.get("traceback") or f"{error.get('type')}: {error.get('message')}")


def logs(
    uuid: JobName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """What happened to a job, a line each: when it began, what it measured, how it ended, and the traceback.

    With --json each line is one object. Exit code 0, however the job ended.
    """
    say = functools.partial(print_json, indent=None) if as_json else _print_event
    with opened(uri) as db, _left_running(uuid):
        run = db.job(uuid)
        record, metrics = run.record, run.metrics
        say(_event(record["created"], "queued", f"{record['type_id']} {record['identifier']}", job=run.uuid))
        begun = False
        for row in itertools.chain(metrics, metrics.follow() if follow else ()):
            if not begun:
                begun = _say_begun(say, run.record)
            say(_event(row.time, row.kind, f"step {row.step}  {numbers(row.values)}", values=dict(row.values)))
        record = run.record
        if not begun:
            _say_begun(say, record)
        if record["status"] in _ENDED:
            say(_ended(db, record))


def _say_begun(say: Callable[[Mapping[str, Any]], None], record: Mapping[str, Any]) -> bool:
    """Say who has begun to run a job, if anybody has."""
    if record.get("started") is None:
        return False
    say(
        _event(
            record["started"], "running", f"attempt {record['attempt']} by {record.get('worker') or 'a worker'}"
        )
    )
    return True


def _ended(db: Datalayer, record: Mapping[str, Any]) -> dict[str, Any]:
    error, status = record.get("error") or {}, record["status"]
    text = " ".join(f"{error['type']}: {error.get('message')}".split()) if error.get("type") else ""
    if status == "succeeded":
        with contextlib.suppress(NotFoundError):  # the version was removed since
            found = db.show(uuid=record["result"])
            text = f"{found['type_id']} {found['identifier']} version {found['version']}"
    return _event(record.get("finished"), status, text, traceback=error.get("traceback"))


def _event(moment: datetime | None, event: str, text: str, **more: Any) -> dict[str, Any]:
    kept = {name: value for name, value in more.items() if value is not None}
    return {"time": iso(moment), "event": event, "text": text, **kept}


def _print_event(event: Mapping[str, Any]) -> None:
    typer.echo(f"{event['time']:<24}  {event['event']:<9}  {event['text']}".rstrip())
    if "traceback" in event:
        typer.echo(event["traceback"].rstrip())


@contextlib.contextmanager
def _left_running(uuid: str) -> Iterator[None]:
    """Say at Ctrl-C that the job goes on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\njob {uuid} goes on; `mongotorch stop {uuid}` ends it", err=True)
        raise typer.Exit(_INTERRUPTED) from None


def watch(
    uuid: JobName,
    timeout_s: Annotated[float | None, typer.Option(min=0, help="Give up after so many seconds.")] = None,
    uri: Uri = None,
) -> None:
    """Print how a job goes on until it has ended; exit code 1 unless it succeeded."""
    with opened(uri) as db, _left_running(uuid):
        run, before, begun = db.job(uuid), "", time.monotonic()
        while True:
            record = run.record
            line = _progress_line(record)
            if line != before:
                typer.echo(line)
                before = line
            if record["status"] in _ENDED:
                break
            if timeout_s is not None and time.monotonic() - begun > timeout_s:
                typer.echo(f"job {run.uuid} has not ended after {timeout_s:g} s", err=True)
                raise typer.Exit(1)
            time.sleep(_LOOK_S)
    raise typer.Exit(0 if record["status"] == "succeeded" else 1)


def _progress_line(record: Mapping[str, Any]) -> str:
    progress, error = record.get("progress") or {}, record.get("error") or {}
    most = f" of {progress['max_steps']}" if progress.get("max_steps") else ""
    parts = [record["status"]]
    parts += [f"step {progress['step']}{most}"] if "step" in progress else []
    parts += [f"{progress['samples_per_s']:,.0f} samples/s"] if "samples_per_s" in progress else []
    parts += (
        [f"{duration(progress['left_s'])} left"] if record["status"] == "running" and "left_s" in progress else []
    )
    parts += [numbers(progress["values"])] if progress.get("values") else []
    parts += [f"{error.get('type')}: {' '.join(str(error.get('message')).split())}"] if error else []
    return "  ".join(parts)


def cancel(uuid: JobName, uri: Uri = None, as_json: AsJson = False) -> None:
    """Make a job stop at its next step and publish nothing; exit code 1 if it had ended already."""
    with opened(uri) as db:
        run = db.job(uuid)
        uuid, done, status = run.uuid, run.cancel(), run.status
    if as_json:
        print_json({"uuid": uuid, "cancelled": done, "status": status})
    else:
        typer.echo(f"job {uuid} is cancelled" if done else f"job {uuid} had ended already: it {_ENDED[status]}")
    raise typer.Exit(0 if done else 1)


def stop(uuid: JobName, uri: Uri = None, as_json: AsJson = False) -> None:
    """Make a job end after its next step and publish the best so far; exit code 1 if it had ended already."""
    with opened(uri) as db:
        run = db.job(uuid)
        uuid, done, status = run.uuid, run.stop(), run.status
    if as_json:
        print_json({"uuid": uuid, "stopped": done, "status": status})
    elif not done:
        typer.echo(f"job {uuid} had ended already: it {_ENDED.get(status, 'has published')}")
    elif status == "cancelled":
        typer.echo(f"job {uuid} is cancelled: it had not begun")
    else:
        typer.echo(f"job {uuid} ends after its next step, and publishes the best so far")
    raise typer.Exit(0 if done else 1)


def run_job(
    uuid: JobName,
    log_level: Annotated[LogLevel, typer.Option(help="What is logged, on stderr.")] = LogLevel.info,
    log_format: Annotated[
        LogFormat, typer.Option(help="Lines for people, or one JSON object each.")
    ] = LogFormat.text,
    uri: Uri = None,
) -> None:
    """Run one job in this process, or in all that torchrun, Slurm or Kubernetes has started with this command.

    Several processes train one model together, if the trainer has lanes for so many; the variables RANK,
    WORLD_SIZE and MASTER_ADDR of torch.distributed say which this is. Exit code 1 unless the job succeeded:
    started again, it goes on from its checkpoint.
    """
    from mongotorch.resources import die_with_parent
    from mongotorch.worker.rank import run_job as run

    die_with_parent()  # torchrun may be killed, and then starts other processes
    with logging_to_stderr(log_level.value, log_format.value), errors():
        address, settings = address_of(uri, writes=True)
        given = settings.model_dump(exclude={"uri", "uri_file", "launcher"})
        status = run(uuid, uri=address, **given)
    typer.echo(f"job {uuid}: {status}", err=True)
    raise typer.Exit(0 if status == "succeeded" else 1)


def worker(
    once: Annotated[bool, typer.Option(help="Run one job, if there is one, and end.")] = False,
    until_idle: Annotated[bool, typer.Option(help="End when no schedule is due and no job waits.")] = False,
    concurrency: Annotated[int, typer.Option(min=1, help="Jobs at once, each in a process of its own.")] = 1,
    log_level: Annotated[LogLevel, typer.Option(help="What is logged, on stderr.")] = LogLevel.info,
    log_format: Annotated[
        LogFormat, typer.Option(help="Lines for people, or one JSON object each.")
    ] = LogFormat.text,
    launcher: Annotated[
        str | None, typer.Option(help="What starts runs with several workers: torchrun, or ray (RAY_ADDRESS).")
    ] = None,
    uri: Uri = None,
) -> None:
    """Run queued jobs, watch the documents of schedules, and fire the schedules that are due.

    Any number of workers may run; one of them at a time fires schedules, and each firing is one job.
    At SIGTERM the current run writes a checkpoint and is handed back, to be resumed by another worker.
    With --once and --until-idle the exit code is 1 if an attempt failed.
    """
    from mongotorch.worker import Supervisor, Tally, Worker

    configure = functools.partial(configure_logging, log_level.value, log_format.value)
    mode = "once" if once else "until_idle" if until_idle else "forever"
    given = {} if launcher is None else {"launcher": launcher}
    with logging_to_stderr(log_level.value, log_format.value), opened(uri, writes=True, **given) as db:
        typer.echo(f"working on {described(db)}")
        if db.uri.startswith("mongomock:"):  # its data is in this process
            alone = Worker(db)
            done = int(alone.once()) if once else alone.run(until_idle=until_idle)
            tally = Tally(done=done, failed=alone.failed)
        else:
            tally = Supervisor(db, count=concurrency, configure=configure).run(mode)
    typer.echo(f"{tally.done} job(s) performed, {tally.failed} failed")
    raise typer.Exit(1 if tally.failed and mode != "forever" else 0)
