"""Puts together what a person wants to see of runs, versions, schedules and what is kept: for the dashboard.

All of it is plain values of JSON, in the same form whatever the records hold: a field of another type than it
should have is left out. It reads documents, and unpickles and writes nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any, Final, final

from mongotorch.codecs import codec_of, describe, referenced
from mongotorch.errors import NotFoundError
from mongotorch.mongo.driver_errors import redact
from mongotorch.store import LIVE, Listing

MODEL: Final = "model"
MOST_COMPARED: Final = 10
"""How many runs are compared at most."""
OBJECTIVE: Final = "objective"
_LEARNING_RATE: Final = "learning_rate"
_DEEPEST: Final = 12  # versions that a lineage goes back
_LONGEST_CODE: Final = 300  # characters of a value
_ASKED: Final = ("filter", "projection", "sort", "skip", "limit", "pipeline", "fold", "split")
Record = dict[str, Any]


@final
class Overview:
    """What the dashboard shows of one database.

    Args:
        listing: The records.
    """

    def __init__(self, listing: Listing) -> None:
        self._listing = listing

    # Runs

    def runs(
        self, *, status: str | None = None, identifier: str | None = None, limit: int = 200, skip: int = 0
    ) -> Record:
        """The newest runs that match: `runs`, the `counts` of all by status, `now`, and whether there are `more`.

        Args:
            status: Only those of this status.
            identifier: Only those of the component of this name.
            limit: At most so many.
            skip: Without the newest so many.
        """
        found = self._listing.jobs(status=status, identifier=identifier, limit=limit + 1, skip=skip)
        return {
            "runs": [_run(job) for job in found[:limit]],
            "more": len(found) > limit,
            "counts": self._listing.count_jobs(),
            "now": self._listing.now(),
        }

    def run(self, job_id: str) -> Record:
        """One run: as in `runs`, with its `recipe`, `parameters`, `environment`, `checkpoints` and `version`.

        Raises:
            NotFoundError: There is no such job.
        """
        job = self._listing.job(job_id)
        if job is None:
            raise NotFoundError(f"no job {job_id}")
        published = self._listing.published(job_id)
        run = _run(job)
        if run["error"] is not None:
            run["error"]["traceback"] = _text(_mapping(job, "error"), "traceback")
        return {
            **run,
            "parameters": _mapping(job, "parameters"),
            "environment": _mapping(job, "environment"),
            "recipe": self._recipe(job),
            **{name: _number(job, name) for name in ("max_attempts", "losses", "failures", "reached")},
            "ready_at": _text(job, "ready_at"),
            "max_runtime_s": _number(job, "max_runtime_s"),
            "checkpoints": self._listing.checkpoints(job_id),
            "version": None if published is None else _version(published),
            "now": self._listing.now(),
        }

    def _recipe(self, job: Mapping[str, Any]) -> dict[str, str]:
        """The fields of what was applied, as code; those that are None are left out."""
        component = _text(job, "component")
        fields = {} if component is None else self._listing.fields(component)
        texts = {name: written(part) for name, part in fields.items()}
        return {name: text for name, text in texts.items() if text}

    def curves(self, job_ids: Sequence[str], *, measured: bool = True) -> Record:
        """What runs have measured: for each of at most ten, its name and `curves`.

        A curve has the `name` of a value, the `kind` of its measurements (`train` or `valid`), and as lists of
        equal length the `steps`, the `seconds` since the run began, and the `values` (None where one is not a
        finite number). Curves of the objective come first.

        Args:
            job_ids: The runs; one that is not there is left out.
            measured: Whether to read what they have measured; without it, `curves` are empty.
        """
        chosen = list(dict.fromkeys(job_ids))[:MOST_COMPARED]
        jobs = {str(job["_id"]): job for job in self._listing.jobs_of(chosen)}
        published = {job: self._listing.published(job) for job in jobs}
        return {
            "runs": [
                {
                    "id": job,
                    "name": _text(jobs[job], "identifier"),
                    "status": _text(jobs[job], "status"),
                    "best_step": _number(published[job] or {}, "best_step"),
                    "curves": _curves(self._listing.measurements(job)) if measured else [],
                }
                for job in chosen
                if job in jobs
            ]
        }

    # Versions

    def models(self) -> Record:
        """Every model: `identifier`, number of `versions`, the `newest` one and its time, and which is `live`."""
        live = {
            str(move.get("identifier")): _number(move, "to_version")
            for move in _heads(self._listing.moves(MODEL))
            if move.get("alias") == LIVE
        }
        names = self._listing.names(MODEL)
        return {"models": [{**name, "live": live.get(str(name["identifier"]))} for name in names]}

    def model(self, identifier: str, *, limit: int = 200) -> Record:
        """The versions of a model, the newest first, and the history of its aliases.

        A version has besides its record `nbytes` and `shared_nbytes` (of what other listed versions have too), and
        the `aliases` that name it. A move of the history has the `verdict` of the version it went to.

        Raises:
            NotFoundError: There is no such model.
        """
        documents = self._listing.versions(MODEL, identifier, limit=limit)
        if not documents:
            raise NotFoundError(f"no model {identifier!r}")
        moves = self._listing.moves(MODEL, identifier)
        named = _named(moves)
        blobs = [list(dict.fromkeys(document.get("blobs") or [])) for document in documents]
        users = Counter(name for names in blobs for name in names)
        sizes = self._listing.sizes(users)
        versions = []
        for document, names in zip(documents, blobs, strict=True):
            shared = sum(sizes.get(name, 0) for name in names if users[name] > 1)
            nbytes = sum(sizes.get(name, 0) for name in names)
            more = {"nbytes": nbytes, "shared_nbytes": shared, "aliases": named.get(document["_id"], [])}
            versions.append({**_version(document), **more})
        verdicts = {version["uuid"]: version["verdict"] for version in versions}
        history = [{**_move(move), "verdict": verdicts.get(_text(move, "to") or "")} for move in moves]
        history.sort(key=lambda move: (move["when"] or "", move["n"] or 0), reverse=True)
        return {"identifier": identifier, "versions": versions, "history": history, "now": self._listing.now()}

    def versions(self, type_id: str, identifier: str, *, limit: int = 200) -> list[Record]:
        """The newest versions of a name of any kind, the newest first, each with the `aliases` that name it."""
        named = _named(self._listing.moves(type_id, identifier))
        found = self._listing.versions(type_id, identifier, limit=limit)
        return [{**_version(document), "aliases": named.get(document["_id"], [])} for document in found]

    def lineage(self, uuid: str) -> Record:
        """Where a version comes from, as a graph of `nodes` and `edges`.

        A node has an `id`, a `kind` (`query`, `run`, `version`, `alias`, `predictions` for a field that a version
        has predicted, or `gone` for a removed version), a `title`, further `lines`, the `generation` (0 for the
        version itself, 1 for what it began from, …), and what it links to: the `job` of a run, the `uuid` of a
        version, the `collection` of predictions.

        Raises:
            NotFoundError: There is no such version.
        """
        graph = _Graph()
        start = self._listing.components([uuid]).get(uuid)
        if start is None:
            raise NotFoundError(f"no version with uuid {uuid}")
        title = {name: start.get(name) for name in ("type_id", "identifier", "version")}
        moves = self._listing.moves(str(start.get("type_id")), str(start.get("identifier")))
        document: Record | None = start
        for generation in range(_DEEPEST):
            if document is None:
                break
            graph.add_version(document, generation, _named(moves))
            origin = _origin(document)
            if origin is None or graph.has(origin):
                break
            document = self._listing.components([origin]).get(origin)
            if document is None:
                graph.add_gone(origin, generation + 1)
        graph.add_predictions(self._listing.predictions(graph.versions))
        return {"uuid": uuid, **title, "nodes": graph.nodes, "edges": graph.edges}

    def predictions(self, uuid: str) -> list[Record]:
        """Into which fields a version has written predictions.

        Returns:
            For each `collection` and field, `into`: the documents `written` in how many `runs`, the `status` of
            the last one, when it was `changed`, its `select`, and its `error`.
        """
        return [_prediction(record) for record in self._listing.predictions([uuid])]

    # Schedules, data, what is kept, and what changes

    def follow(self) -> AbstractContextManager[Callable[[], set[str]]]:
        """Wait for changes, as a context manager: see `Listing.follow`."""
        return self._listing.follow()

    def schedules(self) -> Record:
        """Every schedule: its trigger, the counts toward the next firing, when it is due, its last outcome."""
        return {
            "schedules": [self._schedule(document) for document in self._listing.schedules()],
            "now": self._listing.now(),
        }

    def _schedule(self, document: Mapping[str, Any]) -> Record:
        fields = self._listing.fields(component) if (component := _text(document, "component")) else {}
        state, last, outcome = (_mapping(document, name) for name in ("state", "last", "outcome"))
        return {
            "name": document["_id"],
            "collection": _text(document, "collection"),
            "paused": document.get("paused") is True,
            "trigger": written(fields.get("trigger")),
            "gate": written(fields.get("gate")),
            "counted": {
                name: state.get(name) for name in ("inserted", "changed") if _number(state, name) is not None
            },
            "scores": _mapping(state, "scores"),
            "firings": _number(document, "firings"),
            "next_at": _text(document, "next_at"),
            "last": {name: _text(last, name) for name in ("at", "reason", "job")} if last else None,
            "outcome": {**outcome, "why": _text(outcome, "why")} if outcome else None,
            "problem": _text(document, "problem"),
        }

    def collections(self) -> Record:
        """The names of the user's collections."""
        return {"collections": self._listing.collections()}

    def storage(self) -> Record:
        """What is kept: each of mongotorch's collections with its documents and bytes."""
        return {"collections": self._listing.storage()}


def written(record: Any) -> str:
    """A stored value as Python code, without the arguments that are None; nothing is imported."""
    return redact(_written(record)[:_LONGEST_CODE])


def _written(record: Any) -> str:
    if not isinstance(record, Mapping):
        return "" if record is None else repr(record)
    codec, link = codec_of(record), referenced(record)
    if link is not None:
        return f"{record.get('type_id')} {record.get('identifier')} ({link})"
    if codec == "value":
        fields = _mapping(record, "fields")
        arguments = [
            part[1:-1] if codec_of(fields[name]) == "tuple" else f"{name}={part}"
            for name in fields
            if (part := _written(fields[name]))
        ]
        return f"{str(record.get('class')).rpartition(':')[2]}({', '.join(arguments)})"
    if codec == "tuple":
        return f"({', '.join(_written(item) for item in _list(record, 'items'))})"
    if codec == "query":
        return f"{record.get('collection')} {_asked(record)}".strip()
    if codec in ("name", "int"):
        return str(describe(record))
    return repr(record) if codec is None else f"<{codec}>"


def _asked(query: Mapping[str, Any]) -> str:
    """What a stored query asks for, in short: what is not given, and its collection, are left out."""
    parts = {name: part for name in _ASKED if (part := query.get(name)) and part not in ("{}", "null")}
    return ", ".join(f"{name} {part}" for name, part in parts.items())


@final
class _Graph:
    """Collects the nodes and edges of a lineage."""

    def __init__(self) -> None:
        self.nodes: list[Record] = []
        self.edges: list[list[str]] = []

    def has(self, node: str) -> bool:
        """Whether there is this node."""
        return any(one["id"] == node for one in self.nodes)

    def _add(self, node: str, kind: str, generation: int, title: str, lines: Iterable[str], **links: Any) -> None:
        if not self.has(node):
            shown = [line for line in lines if line]
            self.nodes.append(
                {"id": node, "kind": kind, "generation": generation, "title": title, "lines": shown, **links}
            )

    def add_gone(self, uuid: str, generation: int) -> None:
        """Add a version that was removed, from which the one before began."""
        self._add(uuid, "gone", generation, "removed", [uuid])
        self._connect_parent(uuid, generation)

    def add_version(self, document: Record, generation: int, named: Mapping[str, Sequence[str]]) -> None:
        """Add a version with its run, its data and the aliases that name it."""
        version = _version(document)
        uuid = version["uuid"]
        metrics = [f"{name} {value:.4g}" for name, value in version["metrics"].items()][:3]
        title = f"{version['identifier']} {version['version']}"
        self._add(uuid, "version", generation, title, [*metrics, version["created"] or ""], uuid=uuid)
        if (job := version["job"]) is not None:
            run = f"run {job}"
            steps = "" if version["steps"] is None else f"{version['steps']:,.0f} steps"
            self._add(run, "run", generation, f"run {job[:8]}", [steps, f"seed {version['seed']}"], job=job)
            self.edges.append([run, uuid])
            if (collection := version["data"]["collection"]) is not None:
                query, count = f"query {uuid}", version["data"]["train"]
                counted = "" if count is None else f"{count:,.0f} documents"
                self._add(query, "query", generation, collection, [counted, version["data"]["query"]])
                self.edges.append([query, run])
        for alias in named.get(uuid, ()):
            self._add(f"alias {uuid} {alias}", "alias", generation, alias, [])
            self.edges.append([uuid, f"alias {uuid} {alias}"])
        self._connect_parent(uuid, generation)

    @property
    def versions(self) -> list[str]:
        """The uuids of the versions."""
        return [node["id"] for node in self.nodes if node["kind"] == "version"]

    def add_predictions(self, records: Iterable[Record]) -> None:
        """Add the fields that versions have predicted; behind the alias by which a version was chosen."""
        generations = {node["id"]: node["generation"] for node in self.nodes}
        for record in records:
            uuid, made = _text(record, "uuid") or "", _prediction(record)
            if uuid not in generations:
                continue
            node, alias = f"predictions {record.get('_id')}", f"alias {uuid} {_text(record, 'alias')}"
            counted = f"{made['written']:,} written in {made['runs']:,} {'run' if made['runs'] == 1 else 'runs'}"
            lines = [counted, *(made[name] for name in ("status", "changed", "select", "error"))]
            title, collection = f"{made['collection']}.{made['into']}", made["collection"]
            self._add(node, "predictions", generations[uuid], title, lines, collection=collection)
            self.edges.append([alias if alias in generations else uuid, node])

    def _connect_parent(self, uuid: str, generation: int) -> None:
        runs = [node["id"] for node in self.nodes if (node["kind"], node["generation"]) == ("run", generation - 1)]
        self.edges += [[uuid, run] for run in runs]


def _run(job: Mapping[str, Any]) -> Record:
    progress = _mapping(job, "progress")
    running = job.get("status") == "running"
    return {
        "id": str(job.get("_id")),
        **{name: _text(job, name) for name in ("type_id", "identifier", "method", "status", "worker", "result")},
        **{name: _text(job, name) for name in ("created", "started", "finished", "lease_until", "component")},
        **{name: _number(progress, name) for name in ("step", "max_steps", "samples", "samples_per_s")},
        "left_s": _number(progress, "left_s") if running else None,
        "values": _numbers(_mapping(progress, "values")),
        "validated_step": _number(progress, "validated_step"),
        "attempt": _number(job, "attempt"),
        "error": _error(job),
    }


def _error(job: Mapping[str, Any]) -> Record | None:
    error = _mapping(job, "error")
    return {name: _text(error, name) for name in ("type", "message")} if error else None


def _version(document: Mapping[str, Any]) -> Record:
    data, fields = _mapping(document, "data"), _mapping(document, "fields")
    query, verdict = _mapping(data, "query"), _mapping(document, "verdict")
    return {
        "uuid": str(document.get("_id")),
        **{name: _text(document, name) for name in ("type_id", "identifier", "created", "job", "parent")},
        **{name: _number(document, name) for name in ("version", "steps", "best_step")},
        "seed": document.get("seed"),
        "metrics": _numbers(_mapping(document, "metrics")),
        "verdict": _verdict(verdict) if verdict else None,
        "schedule": _text(_mapping(document, "schedule"), "identifier"),
        "origin": _origin(document),
        "trainer": referenced(fields.get("trainer")),
        "environment": _mapping(document, "environment"),
        "data": {
            "collection": _text(query, "collection"),
            "query": _asked(query),
            "train": _number(_mapping(data, "train"), "count"),
            "valid": _number(_mapping(data, "valid"), "count"),
        },
    }


def _verdict(verdict: Mapping[str, Any]) -> Record:
    interval = verdict.get("interval")
    return {
        "promote": verdict.get("promote") is True,
        "why": _text(verdict, "why"),
        "gate": _text(verdict, "gate"),
        "documents": _number(verdict, "documents"),
        "unit": _text(verdict, "unit"),
        "champion": _numbers(_mapping(verdict, "champion")),
        "challenger": _numbers(_mapping(verdict, "challenger")),
        "against": _number(_mapping(verdict, "against"), "version"),
        "interval": interval if isinstance(interval, list) and len(interval) == 2 else None,
    }


def _prediction(record: Mapping[str, Any]) -> Record:
    texts = {
        name: _text(record, name) or "" for name in ("collection", "into", "status", "changed", "select", "error")
    }
    counts = {name: _number(record, name) or 0 for name in ("written", "runs")}
    return texts | {name: int(count) if math.isfinite(count) else 0 for name, count in counts.items()}


def _move(move: Mapping[str, Any]) -> Record:
    texts = {name: _text(move, name) for name in ("alias", "from", "to", "who", "when", "why", "job")}
    return {**texts, **{name: _number(move, name) for name in ("n", "from_version", "to_version")}}


def _heads(moves: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The newest move of each alias, of moves that come by alias and newest first."""
    heads: dict[tuple[str, str], Mapping[str, Any]] = {}
    for move in moves:
        heads.setdefault((str(move.get("identifier")), str(move.get("alias"))), move)
    return list(heads.values())


def _named(moves: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The aliases that name a version now, by its uuid."""
    named: dict[str, list[str]] = {}
    for move in _heads(moves):
        if (uuid := _text(move, "to")) is not None:
            named.setdefault(uuid, []).append(str(move.get("alias")))
    return named


def _origin(document: Mapping[str, Any]) -> str | None:
    """The uuid of the version that a run began from: for a schedule the live one, else the given one."""
    return _text(_mapping(document, "start"), "model") or _text(document, "parent")


def _curves(entries: Iterable[Mapping[str, Any]]) -> list[Record]:
    found: dict[tuple[str, str], Record] = {}
    begun: float | None = None
    for entry in entries:
        step, at, kind = _number(entry, "step"), _seconds(entry.get("at")), _text(entry, "kind") or "valid"
        if step is None:
            continue
        begun = at if begun is None else begun
        for name, value in _mapping(entry, "values").items():
            empty: Record = {"name": name, "kind": kind, "steps": [], "seconds": [], "values": []}
            curve = found.setdefault((name, kind), empty)
            curve["steps"].append(step)
            curve["seconds"].append(None if at is None or begun is None else round(at - begun, 3))
            curve["values"].append(value if _is_number(value) else None)
    return sorted(found.values(), key=lambda curve: _curve_order(curve["name"], curve["kind"]))


def _curve_order(name: str, kind: str) -> tuple[int, str, str]:
    rank = 0 if name == OBJECTIVE else 2 if name.startswith(_LEARNING_RATE) else 1
    return rank, name, kind


def _seconds(at: Any) -> float | None:
    try:
        return datetime.fromisoformat(at).timestamp() if isinstance(at, str) else None
    except ValueError:  # a date that Python does not have
        return None


def _mapping(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = record.get(name)
    return value if isinstance(value, Mapping) else {}


def _list(record: Mapping[str, Any], name: str) -> list[Any]:
    value = record.get(name)
    return value if isinstance(value, list) else []


def _text(record: Mapping[str, Any], name: str) -> str | None:
    value = record.get(name)
    return value if isinstance(value, str) else None


def _number(record: Mapping[str, Any], name: str) -> float | None:
    value = record.get(name)
    return value if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if _is_number(value)}
