"""The scheduler: watches the documents of schedules, counts what changes, and fires what is due.

Any number of schedulers may run; one at a time leads.

Guarantees: a change is counted once, since a count and the position behind it in the change stream are one write.
What happens while no scheduler leads is counted when one leads again. A lost lease, or another scheduler's write,
is noticed before anything is written. A schedule that cannot be read does not stop the others. A document counts
as arrived when it is in the select and was inserted, or when an update touched a field that the select asks for;
folds that are assigned to documents do not count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
import uuid as uuids
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, final

from mongotorch.errors import MongotorchError
from mongotorch.mongo.change_stream import Baseline, Change, ChangeWatcher, HistoryLostError, baseline, counted
from mongotorch.query import FOLD_FIELD, Query
from mongotorch.schedule import State
from mongotorch.store import Schedules

_AT_ONCE: Final = 1000
Record = Mapping[str, Any]


@final
class Counts:
    """Counts documents of selects; equal questions of several schedules are asked once.

    Args:
        database: The driver's database.
    """

    def __init__(self, database: Any) -> None:
        self._database = database
        self._known: dict[tuple[Query, str], int] = {}

    def __call__(self, query: Query, ids: Sequence[Any]) -> int:
        """How many of these documents are in the select now."""
        key = (query, repr(ids))
        if key not in self._known:
            parts = (ids[at : at + _AT_ONCE] for at in range(0, len(ids), _AT_ONCE))
            self._known[key] = sum(counted(self._database, query, part) for part in parts)
        return self._known[key]


def tally(count: Counts, document: Record, changes: Sequence[Change], now: datetime) -> dict[str, Any]:
    """How some changes change a schedule's document.

    Args:
        count: Counts documents.
        document: The schedule's.
        changes: In their order, of any collection, read behind the document's token or before it.
        now: The time at which they were read.

    Returns:
        The fields to write; empty where none of the changes is new to this schedule.
    """
    among = [change for change in changes if change.collection == document["collection"]]
    mine = [change for change in among if is_behind(change.token, document["token"])]
    if not mine:
        return {}
    query = Query.from_document(document["select"])
    where = {} if query.is_pipeline else query.where
    asked = frozenset(paths_of(where))
    updates = [change for change in mine if change.kind in ("update", "replace") and not _is_fold(change)]
    inserted = _ids(change for change in mine if change.kind == "insert")
    entered = _ids(change for change in updates if _touches(change, asked))
    gone = sum(change.kind in ("delete", "drop") for change in mine)
    added = count(query, inserted)
    arrived = added + count(query, [key for key in entered if key not in inserted])
    changed = added + count(query, _ids(updates)) + gone
    # Whether a deleted document was in the select, or a changed one left it, only a new count can tell.
    is_inexact = bool(where) and (gone > 0 or bool(entered))
    return {
        "token": mine[-1].token,
        "known": document["known"] + added - (0 if where else gone),
        "stale": document["stale"] or is_inexact or any(change.kind == "drop" for change in mine),
        **_observed(document, arrived, changed, now),
    }


def recounted(document: Record, found: Baseline, now: datetime) -> dict[str, Any]:
    """How a new count of its documents changes a schedule's document, where the changes cannot be read.

    Documents that arrived and left between two counts cancel out.
    """
    more = found.count - document["known"]
    if not more and found.token is None:
        return {}
    return {
        "token": found.token,
        "known": found.count,
        "stale": False,
        **_observed(document, max(more, 0), abs(more), now),
    }


def is_behind(token: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether one position in the change stream comes after another: tokens compare as text."""
    return bool(token["_data"] > other["_data"])


def paths_of(where: Any) -> Iterator[str]:
    """The paths that a filter names; those of an `$expr` are not looked for."""
    if isinstance(where, list):
        for part in where:
            yield from paths_of(part)
    elif isinstance(where, Mapping):
        for name, part in where.items():
            if name.startswith("$"):
                yield from paths_of(part) if name in ("$and", "$or", "$nor") else ()
            else:
                yield name


def _observed(document: Record, arrived: int, changed: int, now: datetime) -> dict[str, Any]:
    if not arrived and not changed:
        return {}
    state = State.from_document(document["state"])
    state = dataclasses.replace(
        state,
        inserted=state.inserted + arrived,
        changed=state.changed + changed,
        arrived=state.arrived or now,
    )
    return {"state": state.to_document(), "next_at": now}


def _is_fold(change: Change) -> bool:
    return change.fields == {FOLD_FIELD}


def _touches(change: Change, asked: frozenset[str]) -> bool:
    if change.kind == "replace":
        return bool(asked)
    tops = {path.partition(".")[0] for path in asked}
    return any(field.partition(".")[0] in tops for field in change.fields)


def _ids(changes: Any) -> list[Any]:
    """The `_id`s, each once; they need not be hashable."""
    seen: dict[str, Any] = {}
    for change in changes:
        seen.setdefault(repr(change.document_id), change.document_id)
    return list(seen.values())


_POLL_S: Final = 0.2
_REFRESH_S: Final = 1.0
"""How often the list of schedules is read again."""
_ADVANCE_S: Final = 30.0
"""How often positions advance where nothing changes, so that the server does not forget them."""
_PAUSE_S: Final = 1.0
Document = dict[str, Any]
Look = Callable[[Document, datetime], Document | None]
"""Asks a schedule's trigger and fires; the document as it is then, None where another process has changed it."""
Measure = Callable[[Document, datetime], Mapping[str, Any]]
"""Measures a schedule's live model; the fields of its document that change, none where no measurement is due."""
_log = logging.getLogger("mongotorch.scheduler")


@final
class Scheduler:
    """Watches and fires the schedules of one database.

    Args:
        database: The driver's database.
        schedules: The runtime documents.
        look: Asks a schedule's trigger and fires.
        measure: Measures a schedule's live model.
        lease_s: Seconds after which another scheduler leads when this one goes silent.
        name: The name of this process, for people.
    """

    def __init__(
        self, database: Any, schedules: Schedules, *, look: Look, measure: Measure, lease_s: float, name: str
    ) -> None:
        self._database, self._schedules = database, schedules
        self._look, self._measure = look, measure
        self._lease_s, self._who = lease_s, f"{name}/{uuids.uuid4().hex[:8]}"
        self._known: dict[str, Document] = {}
        self._refreshed = self._advanced = self._renewed = float("-inf")

    def run(self, stop: threading.Event) -> None:
        """Lead, or wait to lead, until `stop` is set. After an error of the database it pauses and goes on."""
        while not stop.is_set():
            try:
                if self._lead():
                    self._lead_until(stop)
                else:
                    stop.wait(min(_PAUSE_S, self._lease_s / 3))
            except MongotorchError as error:
                _log.warning("the scheduler pauses: %s", error)
                stop.wait(_PAUSE_S)
            except Exception:  # noqa: BLE001 - see below
                # A bug must not end the watching for good, unnoticed, while the worker goes on.
                _log.exception("the scheduler pauses")
                stop.wait(_PAUSE_S)
        with contextlib.suppress(MongotorchError):
            self._resign()

    def step(self) -> bool:
        """Count what has changed and fire what is due, once. False: another scheduler leads.

        Raises:
            ServerUnavailableError: The database cannot be reached.
        """
        self._refresh()
        if not self._known:
            return True  # nobody needs a leader
        if not self._lead():
            return False
        try:
            self._catch_up()
            self._poll()
            self._fire()
        finally:
            self._resign()
        return True

    def _catch_up(self) -> None:
        """Count all that has changed up to now."""
        try:
            with self._watching() as watch:
                while watch is not None and self._count(watch.read()):
                    pass
                if watch is not None:
                    self._advance(watch)
        except HistoryLostError:
            self._recount(self._oldest())

    def _lead_until(self, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                with self._watching() as watch:
                    while not stop.is_set() and self._lead() and not self._is_stale(watch):
                        self._turn(watch, stop)
            except HistoryLostError:
                self._recount(self._oldest())
            if not self._lead():
                return

    def _turn(self, watch: ChangeWatcher | None, stop: threading.Event) -> None:
        """Count what has changed, and fire what is due."""
        if watch is None:
            stop.wait(_POLL_S)
        elif not self._count(watch.read()):
            self._advance(watch)
        if time.monotonic() - self._refreshed > _REFRESH_S:
            self._refresh()
            self._poll()
        self._fire()

    def _lead(self) -> bool:
        """Whether this scheduler leads; the lease is renewed three times in its length."""
        if time.monotonic() - self._renewed < self._lease_s / 3:
            return True
        asked = time.monotonic()
        leads = self._schedules.lead(self._who, self._lease_s)
        self._renewed = asked if leads else float("-inf")
        return leads

    def _resign(self) -> None:
        self._renewed = float("-inf")
        self._schedules.resign(self._who)

    @contextlib.contextmanager
    def _watching(self) -> Iterator[ChangeWatcher | None]:
        """The changes behind the oldest position of a schedule; None where nothing can be watched."""
        self._refresh()
        watch = None
        while watch is None and (watched := self._watched()):
            names = {document["collection"] for document in watched}
            try:
                watch = ChangeWatcher(self._database, names, self._oldest()["token"])
            except HistoryLostError:
                self._recount(self._oldest())
        if watch is None:
            yield None
            return
        with watch:
            yield watch

    def _is_stale(self, watch: ChangeWatcher | None) -> bool:
        """Whether other collections have to be watched by now."""
        names = {document["collection"] for document in self._watched()}
        return bool(names) if watch is None else not names <= watch.collections

    def _watched(self) -> list[Document]:
        return [document for document in self._known.values() if document["watches"] and document["token"]]

    def _oldest(self) -> Document:
        return min(self._watched(), key=lambda document: str(document["token"]["_data"]))

    def _refresh(self) -> None:
        self._known = {document["_id"]: document for document in self._schedules.readable()}
        self._refreshed = time.monotonic()

    def _write(self, identifier: str, change: Callable[[Document], Mapping[str, Any]]) -> None:
        """Change a schedule's document depending on its contents; read again if another process has written it."""
        document: Document | None = self._known[identifier]
        while document is not None and (changes := change(document)):
            written = self._schedules.write(document, changes)
            if written is not None:
                self._known[identifier] = written
                return
            self._refresh()
            document = self._known.get(identifier)

    def _count(self, changes: list[Change]) -> bool:
        """Count changes for every schedule; whether there were any."""
        if changes:
            now, count = self._schedules.now(), Counts(self._database)
            for document in self._watched():
                self._write(document["_id"], lambda record: tally(count, record, changes, now))
        return bool(changes)

    def _advance(self, watch: ChangeWatcher) -> None:
        """Nothing has changed: advance the positions, and count again where deletions made a count inexact."""
        for document in self._watched():
            if document["stale"]:
                self._write(document["_id"], self._recount_exact)
        if time.monotonic() - self._advanced > _ADVANCE_S:
            self._advanced, token = time.monotonic(), watch.token
            for document in self._watched():
                self._write(document["_id"], lambda record: _moved(record, token))

    def _recount_exact(self, document: Document) -> Mapping[str, Any]:
        # The count matters only if the position is lost later, and then by its difference to the next count.
        return {"known": counted(self._database, Query.from_document(document["select"])), "stale": False}

    def _poll(self) -> None:
        """Count the documents of schedules whose changes cannot be watched."""
        for document in list(self._known.values()):
            if document["watches"] and not document["token"]:
                self._recount(document)

    def _recount(self, document: Document) -> None:
        found = baseline(self._database, Query.from_document(document["select"]))
        if document["token"]:
            _log.warning(
                "schedule %r: changes were forgotten before they were read; counted again", document["_id"]
            )
        now = self._schedules.now()
        self._write(document["_id"], lambda record: recounted(record, found, now))

    def _fire(self) -> None:
        """Look at the schedules that are due; one that is due again at once is looked at in the next turn."""
        now = self._schedules.now()
        for document in self._schedules.due(now):
            if self._renewed == float("-inf"):
                return
            measured = {} if document["paused"] else self._measure(document, now)
            current = self._schedules.write(document, measured) if measured else document
            looked = self._look(current, now) if current is not None else None
            if looked is not None:
                self._known[looked["_id"]] = looked


def _moved(document: Document, token: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"token": token} if document["token"] and is_behind(token, document["token"]) else {}
