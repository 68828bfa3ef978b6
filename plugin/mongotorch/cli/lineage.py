"""The command `lineage`: what a version was made from, the versions it descends from, and what it has predicted.

It reads documents and unpickles nothing. An ancestor that was removed ends the line, and is shown as gone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mongotorch.cli.output import AsJson, Uri, iso, opened, print_json, print_pairs
from mongotorch.errors import NotFoundError

if TYPE_CHECKING:
    from mongotorch.datalayer import Datalayer
    from mongotorch.store import Move

_IDENTITY = ("type_id", "identifier", "version", "created")
_RUN = (
    *("parent", "start", "job", "schedule", "seed", "steps", "best_step"),
    *("data", "metrics", "verdict", "environment"),
)
_LONGEST = 300  # a query may hold thousands of `_id`s


def lineage(
    of: Annotated[str, typer.Argument(metavar="UUID|TYPE", help="A version's uuid, or its kind: model.")],
    identifier: Annotated[str | None, typer.Argument(help="With a kind: the name.")] = None,
    version: Annotated[
        int | None, typer.Argument(help="The version; without it, the live one, else the newest.")
    ] = None,
    depth: Annotated[int, typer.Option(min=0, help="How many ancestors at most.")] = 20,
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """What a version was made from (data, job, metrics, verdict, …), which it descends from, what it predicted."""
    with opened(uri) as db:
        line = _Line(db)
        document = line.find(of, identifier, version)
        record = line.record(document)
        ancestors = list(line.ancestors(document, depth))
        predictions = db.overview.predictions(record["uuid"])
    if as_json:
        print_json({**record, "ancestors": ancestors, "predictions": predictions})
        return
    from rich.console import Console
    from rich.tree import Tree

    print_pairs(f"{_name(record)} {record['uuid']}", list(_rows(record, ancestors)))
    tree = Tree(_label(record))
    for ancestor in ancestors:
        tree.add(f"from {_label(ancestor)}")
    oldest = ancestors[-1] if ancestors else record
    if _origin(oldest) is not None:
        tree.add("from older ones: --depth")
    for one in predictions:
        times = f"{one['runs']:,} {'run' if one['runs'] == 1 else 'runs'}"
        tree.add(f"predicted {one['collection']}.{one['into']}: {one['written']:,} in {times}, {one['status']}")
    Console(markup=False, highlight=False).print(tree)


class _Line:
    """Follows a version back to its ancestors, and looks up which versions are live.

    Args:
        db: The open database.
    """

    def __init__(self, db: Datalayer) -> None:
        self._db = db
        self._moves: dict[tuple[str, str], Move | None] = {}

    def find(self, of: str, identifier: str | None, version: int | None) -> dict[str, Any]:
        """The document of a uuid, or of a kind, name and version. Raises: NotFoundError."""
        if identifier is None:
            return self._document(of)
        if version is None:
            move = self._live(of, identifier)
            if move is not None and move.to_uuid is not None:
                return self._document(move.to_uuid)
            version = max(self._db.show(of, identifier), default=0)
        document: dict[str, Any] = self._db.show(of, identifier, version)
        return document

    def record(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a document that say where its version comes from, and whether `live` names it."""
        record = {"uuid": document["_id"], **{name: document[name] for name in _IDENTITY}}
        move = self._live(document["type_id"], document["identifier"])
        record["live"] = move is not None and move.to_uuid == document["_id"]
        return record | {name: document[name] for name in _RUN if name in document}

    def ancestors(self, document: Mapping[str, Any], depth: int) -> Iterator[dict[str, Any]]:
        """The records of the versions that one descends from, the nearest first."""
        for _ in range(depth):
            uuid = _origin(document)
            if uuid is None:
                return
            try:
                document = self._document(uuid)
            except NotFoundError:
                yield {"uuid": uuid, "gone": True}
                return
            yield self.record(document)

    def _document(self, uuid: str) -> dict[str, Any]:
        document: dict[str, Any] = self._db.show(uuid=uuid)
        return document

    def _live(self, type_id: str, identifier: str) -> Move | None:
        name = (type_id, identifier)
        if name not in self._moves:
            moves = self._db.history(*name, alias="live")
            self._moves[name] = moves[-1] if moves else None
        return self._moves[name]


def _origin(record: Mapping[str, Any]) -> str | None:
    """The uuid of the version that a run started from: for a schedule the live one, else the given one."""
    start = record.get("start")
    uuid: str | None = start["model"] if start else record.get("parent")
    return uuid


def _rows(record: Mapping[str, Any], ancestors: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    yield "created", iso(record["created"])
    yield "live", "yes" if record["live"] else "no"
    if "job" not in record:
        yield "made by", "no run: it is as it was given"
        return
    if record.get("parent"):
        parent = next((one for one in ancestors if one["uuid"] == record["parent"]), None)
        yield "parent", record["parent"] if parent is None else f"{_name(parent)} {record['parent']}"
    if start := record.get("start"):
        optimizer = f", with the optimizer of {start['trainer']}" if start["trainer"] else ""
        yield "started from", start["model"] + optimizer
    yield "job", record["job"]
    if schedule := record.get("schedule"):
        yield "schedule", f"{schedule['identifier']}, firing {schedule['firing']}: {schedule['reason']}"
    if "seed" in record:
        yield "seed", record["seed"]
    yield "steps", f"{record['steps']}, the best was {record['best_step']}"
    yield from _data_rows(record.get("data") or {})
    if metrics := record.get("metrics"):
        yield "metrics", _numbers(metrics)
    if verdict := record.get("verdict"):
        yield "verdict", f"{'' if verdict['promote'] else 'not '}let through: {verdict['why']} ({verdict['gate']})"
    if environment := record.get("environment"):
        yield "environment", ", ".join(f"{name} {value}" for name, value in environment.items())


def _data_rows(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The record of the documents; only the query, if lineage was off."""
    if "query" in data:
        query = _query(data["query"])
        yield "query", query if len(query) <= _LONGEST else query[:_LONGEST] + " …"
    if watermark := data.get("watermark"):
        yield "watermark", iso(watermark.as_datetime() if hasattr(watermark, "as_datetime") else watermark)
    for fold in ("train", "valid"):
        if members := data.get(fold):
            yield f"{fold} documents", f"{members['count']:,}, digest {members['digest']}"


def _query(document: Mapping[str, Any]) -> str:
    from mongotorch.query import Query

    folded = Query.from_document(document)
    query = dataclasses.replace(folded, fold_name=None)
    split = "" if folded.split is None else f", split={folded.split!r}"
    fold = "" if folded.fold_name is None else f".fold({folded.fold_name!r}{split})"
    if query.is_pipeline:
        return f"{query.collection}.aggregate({query.stages}){fold}"
    shown = f"{query.collection}.find({query.where})" + ("" if folded.fold_behind else fold)
    shown += f".sort({list(query.ordering)})" if query.ordering else ""
    shown += f".skip({query.skipped})" if query.skipped else ""
    shown += f".limit({query.limited})" if query.limited is not None else ""
    return shown + (fold if folded.fold_behind else "")


def _label(record: Mapping[str, Any]) -> str:
    """A version in one line."""
    if record.get("gone"):
        return f"{record['uuid']}, which is gone"
    parts = [_name(record), f"{record['steps']} steps" if "steps" in record else "as it was given"]
    parts += [_numbers(record["metrics"])] if record.get("metrics") else []
    return " · ".join([*parts, *["live"] * record["live"]])


def _name(record: Mapping[str, Any]) -> str:
    return (
        f"{record['type_id']} {record['identifier']} version {record['version']}"
        if "version" in record
        else "gone"
    )


def _numbers(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
