"""The commands of schedules: `mongotorch schedule list|pause|resume|run|preview`.

A worker watches and fires schedules.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mongotorch.cli.output import AsJson, Uri, described, iso, opened, print_json, print_table, time_of, when
from mongotorch.errors import NotFoundError

if TYPE_CHECKING:
    from mongotorch.datalayer import Datalayer

app = typer.Typer(no_args_is_help=True, help="Schedules: what runs again, when, and with which outcome.")
Name = Annotated[str, typer.Argument(metavar="NAME", help="The schedule.")]
_COLUMNS = ("schedule", "state", "trigger", "counted", "firings", "next", "last", "outcome", "problem")
_COUNTED = {"inserted": "new", "changed": "changed"}


@app.command("list")
def list_(uri: Uri = None, as_json: AsJson = False) -> None:
    """Every schedule: its trigger, the counts since it fired, when it is due, and the outcome of the newest run.

    A worker watches and fires schedules: `mongotorch worker`.
    """
    with opened(uri) as db:
        documents = db.schedules()
        triggers = [] if as_json else [_trigger(db, document["component"]) for document in documents]
        where = described(db)
    if as_json:
        print_json(documents)
        return
    if not documents:
        typer.echo(f"no schedule in {where}")
        return
    rows = [_row(document, trigger) for document, trigger in zip(documents, triggers, strict=True)]
    print_table(_COLUMNS, rows, whole=["schedule"])


@app.command()
def pause(name: Name, uri: Uri = None, as_json: AsJson = False) -> None:
    """Stop a schedule from firing by itself; its documents are counted meanwhile."""
    _pause(uri, name, paused=True, as_json=as_json)


@app.command()
def resume(name: Name, uri: Uri = None, as_json: AsJson = False) -> None:
    """Let a paused schedule fire again."""
    _pause(uri, name, paused=False, as_json=as_json)


@app.command()
def run(
    name: Name,
    why: Annotated[str, typer.Option(help="The reason, for the job.")] = "by hand",
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Fire a schedule now, paused or not, and print the uuid of the job, which a worker runs."""
    with opened(uri) as db:
        job = db.fire(name, why=why).uuid
    if as_json:
        print_json({"schedule": name, "job": job, "why": why})
    else:
        typer.echo(job)


@app.command()
def preview(
    name: Name,
    since: Annotated[
        datetime, typer.Option(parser=time_of, metavar="ISO", help="From when on; in UTC, unless it says a zone.")
    ],
    until: Annotated[
        datetime | None, typer.Option(parser=time_of, metavar="ISO", help="To when; without it, now.")
    ] = None,
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """When a schedule would have fired; documents count at the time in their ObjectId."""
    with opened(uri) as db:
        firings = db.preview(db.load("schedule", name), since=since, until=until)
    if as_json:
        print_json([{"at": firing.at, "reason": firing.reason} for firing in firings])
    else:
        print_table(("at", "reason"), ((iso(firing.at), firing.reason) for firing in firings), whole=["at"])


def _pause(uri: str | None, name: str, *, paused: bool, as_json: bool) -> None:
    with opened(uri) as db:
        if paused:
            db.pause(name)
        else:
            db.resume(name)
    if as_json:
        print_json({"schedule": name, "paused": paused})
    else:
        typer.echo(f"schedule {name} is paused" if paused else f"schedule {name} goes on")


def _row(document: Mapping[str, Any], trigger: str) -> tuple[Any, ...]:
    last, outcome = document.get("last") or {}, document.get("outcome") or {}
    shown = ""
    if outcome:
        shown = f"{outcome['model']} version {outcome['version']} "
        shown += "promoted: " if outcome["promoted"] else "not promoted: "
    return (
        document["_id"],
        "paused" if document["paused"] else "on",
        trigger,
        _counted(document),
        document["firings"],
        "" if document["paused"] else when(document["next_at"]),
        f"{when(last['at'])}: {last['reason']}" if last else "",
        shown + outcome.get("why", ""),
        document["problem"] or "",
    )


def _counted(document: Mapping[str, Any]) -> str:
    """The counts and measurements that its trigger looks at, since the last firing."""
    state = document["state"]
    parts = [f"{state[name]:,} {_COUNTED[name]}" for name in _COUNTED if name in document["watches"]]
    parts += [f"{name} {value:.4g}" for name, value in (state.get("scores") or {}).items()]
    return ", ".join(parts)


def _trigger(db: Datalayer, component: str) -> str:
    """A schedule's trigger and its longest wait, from its document alone: nothing is imported."""
    try:
        fields = db.show(uuid=component)["fields"]
    except NotFoundError:  # it was removed while this was printed
        return "?"
    longest = f", or {fields['max_wait']:g} s after the first" if fields["max_wait"] is not None else ""
    return _written(fields["trigger"]) + longest


def _written(record: Any) -> str:
    """A stored value as Python code, without the arguments that are None."""
    from mongotorch.codecs import codec_of

    if not isinstance(record, Mapping):
        return repr(record)
    if codec_of(record) != "value":
        return f"<{codec_of(record) or 'document'}>"
    arguments = []
    for name, part in record["fields"].items():
        if codec_of(part) == "tuple":
            arguments += [_written(item) for item in part["items"]]
        elif part is not None:
            arguments.append(f"{name}={_written(part)}")
    return f"{record['class'].rpartition(':')[2]}({', '.join(arguments)})"
