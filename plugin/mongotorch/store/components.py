"""Stores the components: one document a version, published by one insert.

A document with an `anchor` becomes visible when the component of that uuid does: one insert publishes both.

Guarantees: two publications never get one version number (a unique index decides, the loser takes the next one); a
document never changes after its insert; a job publishes once; nothing is published whose blobs are not stored; a
document is returned only if its signature is valid.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, final

from pymongo import IndexModel
from pymongo.errors import BulkWriteError, DuplicateKeyError

from mongotorch.codecs import WRITTEN, check_format
from mongotorch.component import is_refused
from mongotorch.errors import ConflictError, IntegrityError, JobCancelledError, NotFoundError, TrustError
from mongotorch.mongo.driver_errors import repeated
from mongotorch.mongo.server_features import clock_of, ensure_indexes, in_transaction, records
from mongotorch.store.blobs import BlobStore
from mongotorch.store.jobs import COLLECTION as JOBS
from mongotorch.store.jobs import running
from mongotorch.store.signing import Trust

COLLECTION: Final = "mt.components"
_TRAINED_FIELDS: Final = (
    "type_id",
    "identifier",
    "version",
    "created",
    "anchor",
    "format",
    "data.members",
    "data.certain",
    "data.query.collection",
    "fields.trainer",
)
REMOVED: Final = "mt.removed"
"""For each name of which a version was removed: the highest number that was."""
KIND: Final = "component"
_NOT_REFUSED: Final = {"verdict.promote": {"$ne": False}}
_DUPLICATE_KEY: Final = 11000
SLOW_S: Final = 60.0
"""A publication that takes longer checks afterwards again that nothing it needs was collected."""

_log = logging.getLogger("mongotorch")


@final
class Components:
    """The component documents of one database.

    Args:
        database: The driver's database.
        trust: Signs what is published and verifies what is read; None does neither.
    """

    def __init__(self, database: Any, trust: Trust | None = None) -> None:
        self._documents, self._removed = records(database, COLLECTION), records(database, REMOVED)
        self._jobs = records(database, JOBS)
        self._clock = clock_of(database)
        self._blobs = BlobStore(database)
        self._trust = trust

    @repeated("preparing the components")
    def ensure_indexes(self) -> None:
        """Create the indexes if they do not exist."""
        of_job = {"job": {"$type": "string"}}
        ensure_indexes(
            self._documents,
            IndexModel([("type_id", 1), ("identifier", 1), ("version", 1)], unique=True),
            # A job publishes one document without an anchor, and one for each anchor that it tried.
            IndexModel([("job", 1), ("anchor", 1)], unique=True, partialFilterExpression=of_job),
            IndexModel("blobs"),
            IndexModel("refs"),
        )

    @repeated("publishing a component")
    def publish(
        self,
        document: Mapping[str, Any],
        *,
        needs: Iterable[str] = (),
        only_as: int | None = None,
        attempt: int | None = None,
        touched: Collection[str] = (),
        beside: Sequence[Mapping[str, Any]] = (),
    ) -> int:
        """Insert a document under the next free version number.

        Args:
            document: `_id`, `type_id`, `identifier` and its other fields; its `blobs` are stored already. One
                that says its `format` keeps it.
            needs: Uuids of documents that must exist, visible or not, besides those of `beside`.
            only_as: Insert it only under this number, which `next_version` gave; None takes the next free one.
            attempt: Insert it only while its job runs under this attempt: on a replica set in one transaction, so
                that a job was either cancelled or has published. None checks nothing.
            touched: Blobs that the caller has stored or touched less than `SLOW_S` ago.
            beside: Documents that it refers to, inserted before it, each under the next number of its name: with
                an `attempt` on a replica set all in its transaction.

        Returns:
            The version number, from 0.

        Raises:
            ConflictError: Its `_id` is taken, its job has published already, a document it needs is gone, or the
                next number is not `only_as`.
            JobCancelledError: Its job no longer runs under the attempt; nothing was inserted.
            IntegrityError: One of its blobs is not stored.
            CodecError: BSON cannot hold it.
        """
        needed, all_of_it = tuple(needs), [*beside, document]
        started = time.monotonic()
        self._require(all_of_it, needed, touched)
        version = self._insert(all_of_it, only_as, attempt)
        if time.monotonic() - started > SLOW_S:
            self._require_still(all_of_it, needed)
        return version

    def _insert(self, documents: Sequence[Mapping[str, Any]], only_as: int | None, attempt: int | None) -> int:
        document = documents[-1]
        while True:
            numbers = self._numbers(documents)
            version = numbers[-1]
            if only_as is not None and version != only_as:
                raise ConflictError(
                    f"another version of {document['type_id']} {document['identifier']!r} was stored meanwhile",
                    field="version",
                )
            try:
                signed = [self._signed(*pair) for pair in zip(documents, numbers, strict=True)]
                self._insert_all(signed, attempt)
            except DuplicateKeyError as error:
                # A number was taken: try the next one. Or the uuid or the job was: that stays so.
                earlier = self._own(document)
                if earlier is not None:
                    return earlier
                for one in documents:
                    if one is document or not self._is_stored(one):
                        self._raise_if_taken(one, error)
                continue
            return version

    def _signed(self, document: Mapping[str, Any], version: int) -> Mapping[str, Any]:
        # The version and the format are part of what is signed.
        written = {name: document.get(name, value) for name, value in WRITTEN.items()}
        whole = {**document, **written, "version": version}
        return self._trust.sign(whole, kind=KIND) if self._trust is not None else whole

    @repeated("looking for a version number")
    def next_version(self, type_id: str, identifier: str) -> int:
        """The number of the next version of a name, larger than any it ever had."""
        return self._numbers([{"type_id": type_id, "identifier": identifier}])[0]

    def _numbers(self, documents: Sequence[Mapping[str, Any]]) -> list[int]:
        """The next free version number of each document; several of one name follow each other."""
        names = [(one["type_id"], one["identifier"]) for one in documents]
        following: Counter[str] = Counter()
        for type_id, identifier in set(names):
            named = {"type_id": type_id, "identifier": identifier}
            newest = self._documents.find_one(named, {"version": 1}, sort=[("version", -1)])
            following[f"{type_id}:{identifier}"] = 0 if newest is None else newest["version"] + 1
        # In this order: a removal records the number before the version is gone.
        for removed in self._removed.find({"_id": {"$in": [*following]}}):
            following[removed["_id"]] = max(following[removed["_id"]], removed["version"] + 1)
        numbers = []
        for type_id, identifier in names:
            numbers.append(following[f"{type_id}:{identifier}"])
            following[f"{type_id}:{identifier}"] += 1
        return numbers

    def _insert_all(self, documents: Sequence[Mapping[str, Any]], attempt: int | None) -> None:
        with self._clock.alone():
            if attempt is None:
                self._insert_each(documents)
            else:
                database = self._documents.database
                in_transaction(database, lambda session: self._insert_fenced(documents, attempt, session))

    def _insert_each(self, documents: Sequence[Mapping[str, Any]]) -> None:
        """Insert documents one after the other; an earlier try may have inserted all but the last."""
        for document in documents[:-1]:
            try:
                self._documents.insert_one(document)
            except DuplicateKeyError:
                if not self._is_stored(document):
                    raise
        self._documents.insert_one(documents[-1])

    def _insert_fenced(self, documents: Sequence[Mapping[str, Any]], attempt: int, session: Any) -> None:
        """Insert documents while a job runs under an attempt, and say so in the job, which ends `cancel`."""
        document = documents[-1]
        job, within = document["job"], {} if session is None else {"session": session}
        mine, published = running(job, attempt), {"$set": {"published": document["_id"]}}
        if session is None:
            is_running = self._jobs.count_documents(mine)
        else:  # in a transaction the update is what excludes a `cancel` at the same time
            is_running = self._jobs.update_one(mine, published, **within).matched_count
        if not is_running:
            raise JobCancelledError(
                f"job {job} was cancelled, or its lease ran out and another worker has it; attempt {attempt} "
                "publishes nothing"
            )
        if session is None:
            self._insert_each(documents)
            self._jobs.update_one(mine, published)
            return
        try:
            self._documents.insert_many(documents, session=session)
        except BulkWriteError as error:
            first = error.details["writeErrors"][0]
            if first["code"] != _DUPLICATE_KEY:
                raise
            raise DuplicateKeyError(first["errmsg"], first["code"], first) from error

    def _own(self, document: Mapping[str, Any]) -> int | None:
        """The number under which this very document was inserted for its job or anchor: the answer was lost."""
        job = document.get("job")
        if job is None and document.get("anchor") is None:
            return None
        found = self._documents.find_one(_same(document), {"version": 1})
        return None if found is None else int(found["version"])

    def _is_stored(self, document: Mapping[str, Any]) -> bool:
        return self._documents.find_one(_same(document), {"_id": 1}) is not None

    def _raise_if_taken(self, document: Mapping[str, Any], error: Exception) -> None:
        if self._documents.find_one({"_id": document["_id"]}, {"_id": 1}) is not None:
            raise ConflictError(
                f"uuid {document['_id']} is taken; give the component a uuid of its own", field="uuid"
            ) from error
        job = document.get("job")
        same = {"job": job, "anchor": document.get("anchor")}
        if job is not None and self._documents.find_one(same, {"_id": 1}) is not None:
            raise ConflictError(f"job {job} has published already; this attempt publishes nothing") from error

    def _require(
        self, documents: Sequence[Mapping[str, Any]], needed: tuple[str, ...], touched: Collection[str] = ()
    ) -> None:
        """Check that what documents refer to exists, and protect their blobs from garbage collection."""
        document = documents[-1]
        name = f"{document['type_id']} {document['identifier']!r} ({document['_id']})"
        blobs = {name for one in documents for name in one.get("blobs", ())}.difference(touched)
        missing = self._blobs.touch(blobs) if blobs else []
        if missing:
            raise IntegrityError(f"{name} names blobs that are not there: {missing}; apply it again")
        found = self._documents.count_documents({"_id": {"$in": list(needed)}}) if needed else 0
        if found != len(set(needed)):
            raise ConflictError(f"{name} was to be published with {list(needed)}, which is gone; apply it again")

    def _require_still(self, documents: Sequence[Mapping[str, Any]], needed: tuple[str, ...]) -> None:
        try:
            self._require(documents, needed)
        except (IntegrityError, ConflictError):  # this process slept, and its blobs were collected
            for document in reversed(documents):
                self._documents.delete_one({"_id": document["_id"]})
            raise

    @repeated("reading a component")
    def peek(self, uuid: str) -> dict[str, Any] | None:
        """The visible document of a uuid; None where there is none. Raises: TrustError, FormatError."""
        found = self._documents.find_one({"_id": uuid})
        return self._checked(found) if found is not None and self._visible(found, skip=False) else None

    @repeated("reading a component")
    def get(self, uuid: str) -> dict[str, Any]:
        """The visible document of a uuid. Raises: NotFoundError, TrustError, FormatError."""
        found = self.peek(uuid)
        if found is None:
            raise NotFoundError(f"no component with uuid {uuid}")
        return found

    @repeated("looking for a component")
    def find(self, type_id: str, identifier: str, version: int | None = None) -> dict[str, Any]:
        """The visible document of a version, by default the newest.

        Raises:
            NotFoundError: There is none; the message lists the versions.
            TrustError: It is not what a trusted key signed.
            FormatError: A newer release wrote it.
        """
        given = {} if version is None else {"version": version}
        named = self._named(type_id, identifier, **given)
        found = self._first(named) if version is None else self._checked(next(named, None))
        if found is None:
            versions = self.versions(type_id, identifier)
            name = f"{type_id} {identifier!r}"
            where = f"version {version} of {name}; there are {versions}" if versions else name
            raise NotFoundError(f"no {where}")
        return found

    @repeated("looking for a component")
    def newest(self, type_id: str, identifier: str) -> dict[str, Any] | None:
        """The newest visible version; None where there is none. Raises: TrustError, FormatError."""
        return self._first(self._named(type_id, identifier))

    @repeated("looking for a component")
    def newest_by_default(self, type_id: str, identifier: str) -> dict[str, Any]:
        """The document that a name without a version means: the newest that a run published and no gate refused.

        Where there is none, it is the newest of all that no gate refused.

        Raises:
            NotFoundError: There is no version, or only ones that a gate refused.
            TrustError: A trusted key did not sign it.
        """
        trained = self.newest_trained(type_id, identifier)
        if trained is None:
            return self.find(type_id, identifier)
        if not is_refused(trained):
            return trained
        found = self.newest_trained(type_id, identifier, refused=False)
        if found is not None:
            return found
        name = f"{type_id} {identifier!r}"
        found = self._first(self._named(type_id, identifier, **_NOT_REFUSED))
        if found is None:
            raise NotFoundError(
                f"no version of {name} but those that the gate of a schedule refused; name one, or promote it"
            )
        _log.warning(
            "no version of %s is live, and the trained ones were refused: this is version %s, which was not "
            "trained; promote a version, or name one",
            name,
            found["version"],
        )
        return found

    @repeated("looking for a component")
    def newest_trained(self, type_id: str, identifier: str, *, refused: bool = True) -> dict[str, Any] | None:
        """The newest version that a run published; None where there is none. Raises: TrustError, FormatError.

        Args:
            type_id: The kind.
            identifier: The name.
            refused: Whether one that the gate of a schedule refused counts.
        """
        more = {} if refused else _NOT_REFUSED
        return self._first(self._named(type_id, identifier, job={"$type": "string"}, **more))

    @repeated("looking for a component")
    def by_digest(self, type_id: str, identifier: str, digest: str) -> dict[str, Any] | None:
        """The newest visible version with this content, or None. Raises: TrustError, FormatError."""
        return self._first(self._named(type_id, identifier, digest=digest))

    @repeated("reading a component")
    def of_job(self, job: str) -> dict[str, Any] | None:
        """The document that a job published without an anchor (its model); None where it has not published."""
        # The index holds only jobs that are text: without `$type` the server does not see that it has this one.
        mine = {"job": {"$eq": job, "$type": "string"}, "anchor": None}
        found = self._documents.find_one(mine, {"_id": 1})
        return None if found is None else self.peek(found["_id"])

    @repeated("looking for trained versions")
    def trained(self, collection: str | None = None, *, identifier: str | None = None) -> list[dict[str, Any]]:
        """The visible documents of what runs trained, newest first.

        Without a trust they have only the fields that say which version they are and what it was trained on.

        Args:
            collection: Only those trained on documents of this collection, or that do not say on which: 0.1.0 did
                not record `data`.
            identifier: Only those of this name.

        Raises:
            TrustError: One is not what a trusted key signed.
            FormatError: A newer release wrote one.
        """
        silent = {"data": {"$exists": False}, "job": {"$type": "string"}, "anchor": None}
        recorded = {"data.query.collection": {"$exists": True} if collection is None else collection}
        named = {} if identifier is None else {"identifier": identifier}
        shown = dict.fromkeys(_TRAINED_FIELDS, 1) if self._trust is None else None  # a signature is of all fields
        found = [
            one for one in self._documents.find({"$or": [recorded, silent], **named}, shown) if self._visible(one)
        ]
        found.sort(key=lambda document: (document["created"], document["version"]), reverse=True)
        return [self._read(document) for document in found]

    @repeated("listing versions")
    def versions(self, type_id: str, identifier: str) -> list[int]:
        """The visible version numbers, ascending."""
        named = {"type_id": type_id, "identifier": identifier}
        found = list(self._documents.find(named, {"type_id": 1, "identifier": 1, "version": 1, "anchor": 1}))
        if self._trust is not None:
            return sorted(document["version"] for document in found if self._visible(document))
        # A trainer has an anchor in each version: they are looked up together.
        anchors = list({document["anchor"] for document in found if document.get("anchor") is not None})
        seen = {
            one["_id"]: one.get("refs", ()) for one in self._documents.find({"_id": {"$in": anchors}}, {"refs": 1})
        }
        return sorted(
            document["version"]
            for document in found
            if document.get("anchor") is None or document["_id"] in seen.get(document["anchor"], ())
        )

    @repeated("listing identifiers")
    def identifiers(self, type_id: str) -> list[str]:
        """The identifiers of a kind that have a visible version, sorted."""
        names = self._documents.distinct("identifier", {"type_id": type_id})
        return sorted(name for name in names if self.newest(type_id, name) is not None)

    @repeated("listing kinds")
    def kinds(self) -> list[str]:
        """The kinds that have a visible version, sorted."""
        return sorted(kind for kind in self._documents.distinct("type_id") if self.identifiers(kind))

    @repeated("looking for users")
    def users(self, uuid: str) -> list[dict[str, Any]]:
        """The visible documents that refer to a uuid."""
        return [document for document in self._documents.find({"refs": uuid}) if self._visible(document)]

    @repeated("removing a component")
    def remove(self, uuid: str) -> None:
        """Remove a document; the caller has checked that nothing needs it. Its number is never used again."""
        document = self._documents.find_one({"_id": uuid}, {"type_id": 1, "identifier": 1, "version": 1})
        if document is not None:
            name = f"{document['type_id']}:{document['identifier']}"
            highest = {"$max": {"version": document["version"]}, "$set": dict(WRITTEN)}
            self._removed.update_one({"_id": name}, highest, upsert=True)
        self._documents.delete_one({"_id": uuid})

    def _checked(self, document: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if document is None else self._read(document)

    def _first(self, documents: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
        """The first of them that an accepted key signed; those that none did are skipped, and the log says so.

        Raises:
            TrustError: None of them is signed by an accepted key, or the first that is was changed since.
            FormatError: A newer release wrote it.
        """
        error: TrustError | None = None
        for document in documents:
            try:
                if self._trust is not None:
                    self._trust.check_signer(document, kind=KIND)
            except TrustError as refused:
                _log.warning("a version was skipped: %s", refused)
                error = error or refused
                continue
            return self._read(document)
        if error is not None:
            raise error
        return None

    def _read(self, document: dict[str, Any]) -> dict[str, Any]:
        check_format(document, KIND)
        if self._trust is not None:
            self._trust.check(document, kind=KIND)
        return document

    def _named(self, type_id: str, identifier: str, **more: Any) -> Iterator[dict[str, Any]]:
        found = self._documents.find({"type_id": type_id, "identifier": identifier, **more})
        return (document for document in found.sort("version", -1) if self._visible(document))

    def _visible(self, document: Mapping[str, Any], *, skip: bool = True) -> bool:
        """Whether a document has no anchor, or one that refers back and that an accepted key has signed.

        What an earlier attempt at a publication left stays invisible: no anchor refers to it.

        Raises:
            TrustError: The anchor was changed, or no accepted key has signed it; with `skip` it counts as none,
                and the log says so.
        """
        anchor = document.get("anchor")
        if anchor is None:
            return True
        where = {"_id": anchor, "refs": document["_id"]}
        if self._trust is None:
            return self._documents.find_one(where, {"_id": 1}) is not None
        found = self._documents.find_one(where)
        try:
            if found is not None:
                self._trust.check(found, kind=KIND)
        except TrustError as error:
            if not skip:
                raise
            name = f"{document.get('type_id')} {document.get('identifier')!r} ({document['_id']})"
            _log.warning("%s was skipped: what says that it was published cannot be trusted: %s", name, error)
            return False
        return found is not None


def _same(document: Mapping[str, Any]) -> dict[str, Any]:
    """The filter for this very document, as an earlier try has inserted it."""
    return {"_id": document["_id"]} | {name: document.get(name) for name in ("job", "anchor", "digest")}
