"""What changed for a schedule: from the changes of a collection to the numbers that its trigger decides by.

Always: a change is counted once, since what was counted and the place behind it are written together; a document
counts as arrived when it is in the select and was inserted, or when an update touched what the select asks for and
it is in the select now; folds that are given to documents are no change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, final

from mongotorch.query import FOLD_FIELD, Query
from mongotorch.run import State
from mongotorch.store import Baseline, Change, counted

_AT_ONCE: Final = 1000

Document = Mapping[str, Any]


@final
class Counts:
    """Counts documents of selects; the same ones once, however many schedules look at them.

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


def tally(count: Counts, document: Document, changes: Sequence[Change], now: datetime) -> dict[str, Any]:
    """What a schedule's document has to say after some changes.

    Args:
        count: Counts documents.
        document: The schedule's.
        changes: In their order, of any collection, read behind the document's token or before it.
        now: When they were noticed.

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
    born = count(query, inserted)
    arrived = born + count(query, [key for key in entered if key not in inserted])
    changed = born + count(query, _ids(updates)) + gone
    # Whether a deleted document was in the select, or a changed one left it, only a new count can tell.
    unsure = bool(where) and (gone > 0 or bool(entered))
    return {
        "token": mine[-1].token,
        "known": document["known"] + born - (0 if where else gone),
        "stale": document["stale"] or unsure or any(change.kind == "drop" for change in mine),
        **_observed(document, arrived, changed, now),
    }


def recounted(document: Document, found: Baseline, now: datetime) -> dict[str, Any]:
    """What a schedule's document has to say after its documents were counted, where no change tells.

    Of documents that went and came in between, only what is left over is seen.
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
    """Whether one place in the order of changes comes after another: tokens compare as text."""
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


def _observed(document: Document, arrived: int, changed: int, now: datetime) -> dict[str, Any]:
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
