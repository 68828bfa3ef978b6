"""The command `lineage`: what a version was made of, and the versions that it comes from.

Always: all of it is told from documents; nothing is unpickled. An ancestor that was removed ends the line, and
is said to be gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer
from bson import Timestamp
from rich.console import Console
from rich.tree import Tree

from mongotorch.cli.output import AsJson, Uri, iso, opened, print_json, print_pairs
from mongotorch.datalayer import Datalayer
from mongotorch.errors import NotFoundError
from mongotorch.query import Query
from mongotorch.store import LIVE, Move

_SAID = ("type_id", "identifier", "version", "created")
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
    """What a version was made of (data, job, seed, metrics, verdict, …), and which versions it comes from."""
    with opened(uri) as db:
        line = _Line(db)
        document = line.find(of, identifier, version)
        said = line.facts(document)
        ancestors = list(line.ancestors(document, depth))
    if as_json:
        print_json({**said, "ancestors": ancestors})
        return
    print_pairs(f"{_name(said)} {said['uuid']}", list(_rows(said, ancestors)))
    tree = Tree(_label(said))
    for ancestor in ancestors:
        tree.add(f"from {_label(ancestor)}")
    oldest = ancestors[-1] if ancestors else said
    if _origin(oldest) is not None:
        tree.add("from older ones: --depth")
    Console(markup=False, highlight=False).print(tree)


class _Line:
    """Follows a version back, and knows what is live.

    Args:
        db: The open database.
    """

    def __init__(self, db: Datalayer) -> None:
        self._db = db
        self._moves: dict[tuple[str, str], Move | None] = {}

    def find(self, of: str, identifier: str | None, version: int | None) -> dict[str, Any]:
        """The document that a person names. Raises: NotFoundError."""
        if identifier is None:
            return self._document(of)
        if version is None:
            move = self._live(of, identifier)
            if move is not None and move.to_uuid is not None:
                return self._document(move.to_uuid)
            version = max(self._db.show(of, identifier), default=0)
        document: dict[str, Any] = self._db.show(of, identifier, version)
        return document

    def facts(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """What a document says of where its version comes from, and whether `live` names it."""
        said = {"uuid": document["_id"], **{name: document[name] for name in _SAID}}
        move = self._live(document["type_id"], document["identifier"])
        said["live"] = move is not None and move.to_uuid == document["_id"]
        return said | {name: document[name] for name in _RUN if name in document}

    def ancestors(self, document: Mapping[str, Any], depth: int) -> Iterator[dict[str, Any]]:
        """The facts of the versions that one comes from, the nearest first."""
        for _ in range(depth):
            uuid = _origin(document)
            if uuid is None:
                return
            try:
                document = self._document(uuid)
            except NotFoundError:
                yield {"uuid": uuid, "gone": True}
                return
            yield self.facts(document)

    def _document(self, uuid: str) -> dict[str, Any]:
        document: dict[str, Any] = self._db.show(uuid=uuid)
        return document

    def _live(self, type_id: str, identifier: str) -> Move | None:
        name = (type_id, identifier)
        if name not in self._moves:
            moves = self._db.history(*name, alias=LIVE)
            self._moves[name] = moves[-1] if moves else None
        return self._moves[name]


def _origin(said: Mapping[str, Any]) -> str | None:
    """The uuid of the version that a run began with: of a schedule's run what was live, else what it was given."""
    start = said.get("start")
    uuid: str | None = start["model"] if start else said.get("parent")
    return uuid


def _rows(said: Mapping[str, Any], ancestors: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    yield "created", iso(said["created"])
    yield "live", "yes" if said["live"] else "no"
    if "job" not in said:
        yield "made by", "no run: it is as it was given"
        return
    if said.get("parent"):
        parent = next((one for one in ancestors if one["uuid"] == said["parent"]), None)
        yield "parent", said["parent"] if parent is None else f"{_name(parent)} {said['parent']}"
    if start := said.get("start"):
        optimizer = f", with the optimizer of {start['trainer']}" if start["trainer"] else ""
        yield "started from", start["model"] + optimizer
    yield "job", said["job"]
    if schedule := said.get("schedule"):
        yield "schedule", f"{schedule['identifier']}, firing {schedule['firing']}: {schedule['reason']}"
    if "seed" in said:
        yield "seed", said["seed"]
    yield "steps", f"{said['steps']}, the best was {said['best_step']}"
    yield from _data_rows(said.get("data") or {})
    if metrics := said.get("metrics"):
        yield "metrics", _numbers(metrics)
    if verdict := said.get("verdict"):
        yield "verdict", f"{'' if verdict['promote'] else 'not '}let through: {verdict['why']} ({verdict['gate']})"
    if environment := said.get("environment"):
        yield "environment", ", ".join(f"{name} {value}" for name, value in environment.items())


def _data_rows(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What is known of the documents: only the query, where lineage was off."""
    if "query" in data:
        query = _query(data["query"])
        yield "query", query if len(query) <= _LONGEST else query[:_LONGEST] + " …"
    if watermark := data.get("watermark"):
        yield "watermark", iso(watermark.as_datetime() if isinstance(watermark, Timestamp) else watermark)
    for fold in ("train", "valid"):
        if facts := data.get(fold):
            yield f"{fold} documents", f"{facts['count']:,}, digest {facts['digest']}"


def _query(document: Mapping[str, Any]) -> str:
    query = Query.from_document(document)
    if query.is_pipeline:
        return f"{query.collection}.aggregate({query.stages})"
    said = f"{query.collection}.find({query.where})"
    said += f".sort({list(query.ordering)})" if query.ordering else ""
    said += f".skip({query.skipped})" if query.skipped else ""
    return said + (f".limit({query.limited})" if query.limited is not None else "")


def _label(said: Mapping[str, Any]) -> str:
    """One version in a line."""
    if said.get("gone"):
        return f"{said['uuid']}, which is gone"
    parts = [_name(said), f"{said['steps']} steps" if "steps" in said else "as it was given"]
    parts += [_numbers(said["metrics"])] if said.get("metrics") else []
    return " · ".join([*parts, *["live"] * said["live"]])


def _name(said: Mapping[str, Any]) -> str:
    return f"{said['type_id']} {said['identifier']} version {said['version']}" if "version" in said else "gone"


def _numbers(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
