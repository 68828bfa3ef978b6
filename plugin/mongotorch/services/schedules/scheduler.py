"""The scheduler: watches the documents of schedules, counts what changes, and fires what is due.

Any number of schedulers may run; one at a time leads, under a lease that a thread renews.

Guarantees: changes are read for a quarter of a second at most, however many come, so that what is due is fired in
between. What happens while no scheduler leads is counted when one leads again. A lost lease, or another
scheduler's write, is noticed before anything is written. Each schedule is on its own: one whose document, trigger
or select cannot be used gets a `problem`, is tried again later, and stops no other; a live model is measured in a
thread, and nothing waits for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import queue
import threading
import time
import uuid as uuids
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from datetime import datetime
from typing import Any, Final, final

from mongotorch.errors import MongotorchError, ServerUnavailableError
from mongotorch.mongo.change_stream import (
    Change,
    ChangeWatcher,
    HistoryLostError,
    baseline,
    counted,
    position,
)
from mongotorch.mongo.driver_errors import redact
from mongotorch.query import Query
from mongotorch.resources import Owner
from mongotorch.schedule import State
from mongotorch.services.schedules.register import (
    Counts,
    defect_of,
    is_behind,
    log_schedule,
    recounted,
    tally,
)
from mongotorch.store import Schedules

_POLL_S: Final = 0.2
_REFRESH_S: Final = 1.0
"""How often the list of schedules is read again."""
_ADVANCE_S: Final = 30.0
"""How often positions advance for which nothing changes, so that the server does not forget them."""
_PAUSE_S: Final = 1.0
_MAX_BACK_OFF_S: Final = 60.0
"""How long a schedule with a problem is left alone at most; the first time it is a second."""
Document = dict[str, Any]
Look = Callable[[Document, datetime], Document | None]
"""Asks a schedule's trigger and fires; the document as it is then, None where another process has changed it."""
Measure = Callable[[Document, datetime], Mapping[str, Any]]
"""Measures a schedule's live model: `scores`, when they were `scored`, and a `problem`; empty if none is due."""
Settle = Callable[[Document], Mapping[str, Any]]
"""Looks how a schedule's newest run ended; the fields of its document that change."""
_NO_PROBLEM: Final[Document] = {"problem": None, "problem_of": None}
_log = logging.getLogger("mongotorch.scheduler")


@final
class Leadership:
    """The lead among the schedulers of one database.

    Args:
        schedules: The documents, which the lease is one of.
        lease_s: Seconds after which another scheduler leads when this one goes silent.
        name: The name of this process, for people.
    """

    def __init__(self, schedules: Schedules, *, lease_s: float, name: str) -> None:
        self._schedules, self._lease_s = schedules, lease_s
        self._who = f"{name}/{uuids.uuid4().hex[:8]}"
        self._until = float("-inf")
        self.wait_s = min(_PAUSE_S, lease_s / 3)

    @property
    def is_kept(self) -> bool:
        """Whether this scheduler leads, for all that it knows."""
        return time.monotonic() < self._until

    def take(self) -> bool:
        """Become the leader, or extend the lease. False: another scheduler leads."""
        asked = time.monotonic()
        leads = self._schedules.lead(self._who, self._lease_s)
        self._until = asked + self._lease_s if leads else float("-inf")
        return leads

    @contextlib.contextmanager
    def renewed(self) -> Iterator[None]:
        """Renews the lease from a thread, three times in its length, until it is lost."""
        ended = threading.Event()

        def renew() -> None:
            while not ended.wait(self._lease_s / 3):
                with contextlib.suppress(MongotorchError):  # tried again, as long as the lease lasts
                    if not self.take():
                        return

        thread = threading.Thread(target=renew, name="mongotorch-leadership", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def resign(self) -> None:
        """Let another scheduler lead at once; does nothing unless this one leads."""
        self._until = float("-inf")
        self._schedules.resign(self._who)


@final
class _Background(Owner):
    """Calls functions one after the other in a thread that nothing waits for, not even the end of the process."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="mongotorch-measurements", daemon=True).start()

    def submit(self, function: Measure, document: Document, now: datetime) -> Future[Mapping[str, Any]]:
        """Call a function later; what it returns or raises is in the future."""
        future: Future[Mapping[str, Any]] = Future()

        def call() -> None:
            try:
                future.set_result(function(document, now))
            except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
                future.set_exception(error)

        self._calls.put(call)
        return future

    def close(self) -> None:
        """End the thread after the calls that wait."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


@dataclasses.dataclass
class _SetAside:
    """A schedule that is left alone for a while.

    Attributes:
        until: Until when, by the monotonic clock.
        failures: How often it failed in a row.
    """

    until: float
    failures: int


@final
class Scheduler:
    """Watches and fires the schedules of one database.

    Args:
        database: The driver's database.
        schedules: The runtime documents.
        look: Asks a schedule's trigger and fires.
        measure: Measures a schedule's live model.
        settle: Looks how a schedule's newest run ended.
        lease_s: Seconds after which another scheduler leads when this one goes silent.
        name: The name of this process, for people.
    """

    def __init__(
        self,
        database: Any,
        schedules: Schedules,
        *,
        look: Look,
        measure: Measure,
        settle: Settle,
        lease_s: float,
        name: str,
    ) -> None:
        self._database, self._schedules = database, schedules
        self._look, self._measure, self._settle = look, measure, settle
        self._leadership = Leadership(schedules, lease_s=lease_s, name=name)
        self._known: dict[str, Document] = {}
        self._aside: dict[str, _SetAside] = {}
        # The lives of schedules for which each change behind their position was read.
        self._whole: set[str] = set()
        self._measuring: dict[str, Future[Mapping[str, Any]]] = {}
        self._refreshed = self._advanced = float("-inf")

    def run(self, stop: threading.Event) -> None:
        """Lead, or wait to lead, until `stop` is set. After an error of the database it pauses and goes on."""
        while not stop.is_set():
            try:
                if not self._leadership.take():
                    stop.wait(self._leadership.wait_s)
                    continue
                with self._leadership.renewed(), _Background() as background:
                    self._lead_until(stop, background)
            except MongotorchError as error:
                _log.warning("the scheduler pauses: %s", error)
                stop.wait(_PAUSE_S)
            except Exception:  # noqa: BLE001 - see below
                # A bug must not end the watching for good, unnoticed, while the worker goes on.
                _log.exception("the scheduler pauses")
                stop.wait(_PAUSE_S)
        with contextlib.suppress(MongotorchError):
            self._leadership.resign()

    def step(self) -> bool:
        """Count what has changed up to now and fire what is due, once. False: another scheduler leads.

        Raises:
            ServerUnavailableError: The database cannot be reached.
        """
        self._refresh()
        if not self._known:
            return True  # nobody needs a leader
        if not self._leadership.take():
            return False
        try:
            with self._leadership.renewed():
                self._catch_up()
                self._poll()
                self._fire()
        finally:
            self._leadership.resign()
        return True

    def _catch_up(self) -> None:
        """Count all that has changed up to now, and not what comes meanwhile."""
        try:
            with self._watching() as watch:
                end = None if watch is None else position(self._database)
                while watch is not None and self._leadership.is_kept:
                    before, changes = watch.token, watch.read()
                    self._count(changes)
                    if end is not None and not is_behind(end, watch.token):
                        break
                    if not changes and watch.token == before:
                        break
                if watch is not None:
                    self._advance(watch)
        except HistoryLostError:
            self._recount_oldest()

    def _lead_until(self, stop: threading.Event, background: _Background) -> None:
        while not stop.is_set() and self._leadership.is_kept:
            try:
                with self._watching() as watch:
                    while not stop.is_set() and self._leadership.is_kept and not self._is_stale(watch):
                        self._turn(watch, stop, background)
            except HistoryLostError:
                self._recount_oldest()

    def _turn(self, watch: ChangeWatcher | None, stop: threading.Event, background: _Background) -> None:
        """Count what has changed, and fire what is due."""
        if watch is None:
            stop.wait(_POLL_S)
        elif not self._count(watch.read()) or time.monotonic() - self._advanced > _ADVANCE_S:
            self._advance(watch)
        if time.monotonic() - self._refreshed > _REFRESH_S:
            self._refresh()
            self._poll()
        self._fire(background)

    # Which schedules there are, and what to watch for them

    @contextlib.contextmanager
    def _watching(self) -> Iterator[ChangeWatcher | None]:
        """The changes behind the oldest position of a schedule; None where nothing can be watched."""
        self._refresh()
        self._recount_unreachable()
        watch = None
        while watch is None and (watched := self._watched()):
            names = {document["collection"] for document in watched}
            try:
                watch = ChangeWatcher(self._database, names, _oldest(watched)["token"])
            except HistoryLostError:
                self._recount_oldest()
        self._whole = {document["life"] for document in watched}
        if watch is None:
            yield None
            return
        with watch:
            yield watch

    def _is_stale(self, watch: ChangeWatcher | None) -> bool:
        """Whether other collections have to be watched by now, or earlier changes to be read for a schedule."""
        watched = self._watched()
        if watch is None:
            return bool(watched)
        names = {document["collection"] for document in watched}
        return not names <= watch.collections or len(self._counted()) < len(watched)

    def _watched(self) -> list[Document]:
        """The schedules whose changes are read, without those that are left alone."""
        return [one for one in self._known.values() if one["watches"] and one["token"] and self._is_ready(one)]

    def _counted(self) -> list[Document]:
        """Those of them for which no change was passed over, since they were new, or left alone."""
        return [one for one in self._watched() if one["life"] in self._whole]

    def _refresh(self) -> None:
        """Read the list of schedules, without those whose documents cannot be used."""
        self._known = {}
        for document in self._schedules.readable():
            why = defect_of(document)
            if why is not None:
                self._note(document, f"its document in mt.schedules cannot be used: {why}", of="document")
                continue
            self._known[document["_id"]] = document
            if document.get("problem_of") == "document":
                self._write(document["_id"], lambda _: _NO_PROBLEM)
        self._aside = {name: aside for name, aside in self._aside.items() if name in self._known}
        for document in list(self._known.values()):
            self._alone(document, "run", self._write, document["_id"], self._settle)
        self._refreshed = time.monotonic()

    def _write(self, identifier: str, change: Callable[[Document], Mapping[str, Any]]) -> None:
        """Change a schedule's document depending on its contents; read again if another process has written it."""
        document: Document | None = self._known.get(identifier)
        while document is not None and (changes := change(document)):
            written = self._schedules.write(document, changes)
            if written is not None:
                self._known[identifier] = written
                return
            document = self._schedules.peek(identifier)
            if document is None or defect_of(document) is not None:
                self._known.pop(identifier, None)
                return
            self._known[identifier] = document

    # Each schedule on its own

    def _alone(self, document: Document, doing: str, act: Callable[..., Any], *given: Any) -> None:
        """Do something for one schedule; where it fails, the schedule is left alone for a while.

        Raises:
            ServerUnavailableError: The database cannot be reached: no schedule is at fault.
        """
        try:
            act(*given)
        except ServerUnavailableError:
            raise
        except Exception as error:  # noqa: BLE001 - a person's trigger, filter or objective may raise anything
            before = self._aside.get(document["_id"], _SetAside(0.0, 0))
            wait_s = min(2.0**before.failures, _MAX_BACK_OFF_S)
            self._aside[document["_id"]] = _SetAside(time.monotonic() + wait_s, before.failures + 1)
            if doing == "counting":
                self._whole.discard(document["life"])
            own = isinstance(error, MongotorchError)
            why = error.message if isinstance(error, MongotorchError) else f"{type(error).__name__}: {error}"
            _log.debug("schedule %r: %s failed; again in %g s", document["_id"], doing, wait_s, exc_info=error)
            self._note(document, why if own else f"its {doing} failed: {why}", of=doing)

    def _note(self, document: Document, problem: str, *, of: str) -> None:
        """Keep the problem of a schedule, and log it once."""
        problem = redact(problem)
        if document.get("problem") != problem:
            log_schedule(document["_id"], "problem", problem, level=logging.WARNING)
            document |= {"problem": problem, "problem_of": of}
            self._schedules.note(document["_id"], problem, of=of)

    def _is_ready(self, document: Document) -> bool:
        """Whether a schedule is not left alone at this moment."""
        aside = self._aside.get(document["_id"])
        return aside is None or time.monotonic() >= aside.until

    # Counting

    def _count(self, changes: list[Change]) -> bool:
        """Count changes for every schedule; whether there were any."""
        if changes:
            now, count, counted_for = self._schedules.now(), Counts(self._database), self._counted()
            self._whole = {document["life"] for document in counted_for}
            for document in counted_for:

                def change(record: Document) -> Mapping[str, Any]:
                    return tally(count, record, changes, now)

                self._alone(document, "counting", self._write, document["_id"], change)
        return bool(changes)

    def _advance(self, watch: ChangeWatcher) -> None:
        """Advance positions behind what is counted, and count again where deletions made a count inexact."""
        for document in self._counted():
            if document["stale"]:
                self._alone(document, "counting", self._write, document["_id"], self._recount_exact)
        if time.monotonic() - self._advanced > _ADVANCE_S:
            self._advanced, token = time.monotonic(), watch.token
            for document in self._counted():
                self._write(document["_id"], lambda record: _moved(record, token))

    def _recount_exact(self, document: Document) -> Mapping[str, Any]:
        # The count matters only if the position is lost later, and then by its difference to the next count.
        return {"known": counted(self._database, Query.from_document(document["select"])), "stale": False}

    def _poll(self) -> None:
        """Count the documents of schedules whose changes cannot be watched."""
        for document in list(self._known.values()):
            if document["watches"] and not document["token"] and self._is_ready(document):
                self._alone(document, "counting", self._recount, document)

    def _recount_oldest(self) -> None:
        if watched := self._watched():
            oldest = _oldest(watched)
            self._alone(oldest, "counting", self._recount, oldest)

    def _recount_unreachable(self) -> None:
        """Count again for schedules whose position lies ahead: no change is behind it until that time has come.

        Another server gave it, of whose database this is a copy.
        """
        watched = self._watched()
        end = position(self._database) if watched else None
        for document in watched:
            if end is not None and is_behind(document["token"], end):
                self._alone(document, "counting", self._recount, document)

    def _recount(self, document: Document) -> None:
        found = baseline(self._database, Query.from_document(document["select"]))
        if document["token"]:
            _log.warning(
                "schedule %r: changes were forgotten before they were read; counted again", document["_id"]
            )
        now = self._schedules.now()
        self._write(document["_id"], lambda record: recounted(record, found, now))

    # Firing

    def _fire(self, background: _Background | None = None) -> None:
        """Look at the schedules that are due; one that is due again at once is looked at in the next turn.

        Args:
            background: Where live models are measured; None measures them here.
        """
        now = self._schedules.now()
        for identifier in [name for name, measured in self._measuring.items() if measured.done()]:
            self._take_measurement(identifier, self._measuring.pop(identifier), now)
        for document in self._schedules.due(now):
            if not self._leadership.is_kept:
                return
            if defect_of(document) is None and self._is_ready(document):
                self._known[document["_id"]] = document
                self._alone(document, "trigger", self._look_at, document, now, background)

    def _look_at(self, document: Document, now: datetime, background: _Background | None) -> None:
        """Ask the trigger of a schedule; its live model is measured before, or in the background."""
        identifier = document["_id"]
        if not document["paused"] and identifier not in self._measuring:
            if background is None:
                found: Future[Mapping[str, Any]] = Future()
                found.set_result(self._measure(document, now))
                self._take_measurement(identifier, found, now)
            else:
                self._measuring[identifier] = background.submit(self._measure, document, now)
        current = self._known.get(identifier)
        looked = None if current is None else self._look(current, now)
        if looked is not None:
            self._known[identifier] = looked
        if not (document["watches"] and document["token"]) or document["life"] in self._whole:
            self._aside.pop(identifier, None)

    def _take_measurement(self, identifier: str, measured: Future[Mapping[str, Any]], now: datetime) -> None:
        """Write what was measured of a live model; its trigger is asked about it at once."""

        def change(document: Document) -> Mapping[str, Any]:
            found = measured.result()
            if not found:
                return {}
            state = State.from_document(document["state"])
            state = dataclasses.replace(state, scores=found["scores"], scored=found["scored"])
            changes = {"state": state.to_document(), "next_at": now}
            if found["problem"] is not None:
                self._note(document, found["problem"], of="measurement")
            elif document.get("problem_of") == "measurement":
                changes |= _NO_PROBLEM
            return changes

        if identifier in self._known:
            self._alone(self._known[identifier], "measurement", self._write, identifier, change)


def _moved(document: Document, token: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"token": token} if document["token"] and is_behind(token, document["token"]) else {}


def _oldest(watched: list[Document]) -> Document:
    return min(watched, key=lambda document: str(document["token"]["_data"]))
