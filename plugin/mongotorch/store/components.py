"""The component documents: one a version, and the one insert that publishes it.

Always: two at once never get one version number (the index decides, the loser takes the next); a document is
never changed after its insert; a document with an `anchor` is visible only when the component of that uuid
is, so that the insert of the anchor publishes both; what is invisible is in nobody's way; a job publishes
once; nothing is published whose blobs are not there; a document is given out only if its signature holds.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, final

from pymongo.errors import DuplicateKeyError

from mongotorch.codecs import WRITTEN, check_format
from mongotorch.errors import ConflictError, IntegrityError, NotFoundError
from mongotorch.mongo.error_translation import driver_errors
from mongotorch.mongo.server_features import ensure_index
from mongotorch.store.blobs import BlobStore
from mongotorch.store.signing import Trust

COLLECTION: Final = "mt.components"
KIND: Final = "component"
SLOW_S: Final = 60.0
"""A publication that takes longer between its last look and its end looks again."""


@final
class Components:
    """The component documents of one database.

    Args:
        database: The driver's database.
        trust: Signs what is published and checks what is given out; None does neither.
    """

    def __init__(self, database: Any, trust: Trust | None = None) -> None:
        self._documents = database[COLLECTION]
        self._artifacts = BlobStore(database)
        self._trust = trust or Trust()

    @driver_errors("preparing the components")
    def ensure_indexes(self) -> None:
        """Make the indexes that the promises rest on; does nothing where they are there."""
        ensure_index(self._documents, [("type_id", 1), ("identifier", 1), ("version", 1)], unique=True)
        # A job publishes one document without an anchor, and one for each anchor that it ever tried.
        of_job = {"job": {"$type": "string"}}
        ensure_index(self._documents, [("job", 1), ("anchor", 1)], unique=True, partialFilterExpression=of_job)
        ensure_index(self._documents, "blobs")
        ensure_index(self._documents, "refs")

    @driver_errors("publishing a component")
    def publish(self, document: Mapping[str, Any], *, needs: Iterable[str] = ()) -> int:
        """Insert a document under the next free version number.

        Args:
            document: `_id`, `type_id`, `identifier`, and what else it says; its `blobs` are stored already.
            needs: Uuids of documents that must be there, visible or not.

        Returns:
            The version number, from 0.

        Raises:
            ConflictError: Its `_id` is taken, its job has published, or what it needs is gone.
            IntegrityError: A blob of it is not there.
        """
        needed = tuple(needs)
        started = time.monotonic()
        self._require(document, needed)
        version = self._insert(document)
        if time.monotonic() - started > SLOW_S:
            self._require_still(document, needed)
        return version

    def _insert(self, document: Mapping[str, Any]) -> int:
        name = {"type_id": document["type_id"], "identifier": document["identifier"]}
        while True:
            last = self._documents.find_one(name, {"version": 1}, sort=[("version", -1)])
            version: int = 0 if last is None else last["version"] + 1
            try:
                # The version and the format are part of what is signed.
                said = {**document, **WRITTEN, "version": version}
                self._documents.insert_one(self._trust.sign(said, kind=KIND))
            except DuplicateKeyError as error:
                # Somebody took the number, and there is a next one; or the uuid or the job is taken for ever.
                self._raise_if_taken(document, error)
                continue
            return version

    def _raise_if_taken(self, document: Mapping[str, Any], error: Exception) -> None:
        if self._documents.find_one({"_id": document["_id"]}, {"_id": 1}) is not None:
            raise ConflictError(
                f"uuid {document['_id']} is taken; give the component a uuid of its own", field="uuid"
            ) from error
        job = document.get("job")
        same = {"job": job, "anchor": document.get("anchor")}
        if job is not None and self._documents.find_one(same, {"_id": 1}) is not None:
            raise ConflictError(f"job {job} has published already; this attempt publishes nothing") from error

    def _require(self, document: Mapping[str, Any], needed: tuple[str, ...]) -> None:
        """Look for what the document refers to; from here on `gc` lets its blobs be, for its grace."""
        name = f"{document['type_id']} {document['identifier']!r} ({document['_id']})"
        missing = self._artifacts.touch(document.get("blobs", ()))
        if missing:
            raise IntegrityError(f"{name} names blobs that are not there: {missing}; apply it again")
        there = self._documents.count_documents({"_id": {"$in": list(needed)}}) if needed else 0
        if there != len(set(needed)):
            raise ConflictError(f"{name} was to be published with {list(needed)}, which is gone; apply it again")

    def _require_still(self, document: Mapping[str, Any], needed: tuple[str, ...]) -> None:
        try:
            self._require(document, needed)
        except (IntegrityError, ConflictError):  # this process slept, and what it had written was collected
            self._documents.delete_one({"_id": document["_id"]})
            raise

    @driver_errors("reading a component")
    def peek(self, uuid: str) -> dict[str, Any] | None:
        """The visible document of a uuid, None where there is none. Raises: TrustError."""
        found = self._documents.find_one({"_id": uuid})
        return self._checked(found) if found is not None and self._visible(found) else None

    @driver_errors("reading a component")
    def get(self, uuid: str) -> dict[str, Any]:
        """The visible document of a uuid. Raises: NotFoundError, TrustError."""
        found = self.peek(uuid)
        if found is None:
            raise NotFoundError(f"no component with uuid {uuid}")
        return found

    @driver_errors("looking for a component")
    def find(self, type_id: str, identifier: str, version: int | None = None) -> dict[str, Any]:
        """The document of a name, its newest version unless one is given.

        Raises:
            NotFoundError: There is none; the message names the versions there are.
            TrustError: It is not what a trusted key signed.
        """
        asked = {} if version is None else {"version": version}
        found = self._checked(next(self._named(type_id, identifier, **asked), None))
        if found is None:
            there = self.versions(type_id, identifier)
            wanted = f"version {version} of {type_id} {identifier!r}" if there else f"{type_id} {identifier!r}"
            raise NotFoundError(f"no {wanted}" + (f"; there are {there}" if there else ""))
        return found

    @driver_errors("looking for a component")
    def newest(self, type_id: str, identifier: str) -> dict[str, Any] | None:
        """The document of the newest visible version, None where there is none."""
        return self._checked(next(self._named(type_id, identifier), None))

    @driver_errors("looking for a component")
    def by_digest(self, type_id: str, identifier: str, digest: str) -> dict[str, Any] | None:
        """The newest visible version with this content, None where there is none."""
        return self._checked(next(self._named(type_id, identifier, digest=digest), None))

    @driver_errors("reading a component")
    def of_job(self, job: str) -> dict[str, Any] | None:
        """The document that a job published without an anchor: its model; None where it has not published."""
        found = self._documents.find_one({"job": job, "anchor": None}, {"_id": 1})
        return None if found is None else self.peek(found["_id"])

    @driver_errors("looking for trained versions")
    def trained(self, collection: str | None = None) -> Iterator[dict[str, Any]]:
        """The visible documents that say what they were trained on, the newest first. Raises: TrustError.

        Args:
            collection: Only those trained on documents of this collection.
        """
        where = {"data.query.collection": {"$exists": True} if collection is None else collection}
        for document in self._documents.find(where).sort([("created", -1), ("version", -1)]):
            if self._visible(document):
                yield self._read(document)

    @driver_errors("listing versions")
    def versions(self, type_id: str, identifier: str) -> list[int]:
        """The visible version numbers, ascending."""
        return sorted(document["version"] for document in self._named(type_id, identifier))

    @driver_errors("listing identifiers")
    def identifiers(self, type_id: str) -> list[str]:
        """The identifiers of a kind that have a visible version, in order."""
        names = self._documents.distinct("identifier", {"type_id": type_id})
        return sorted(name for name in names if self.newest(type_id, name) is not None)

    @driver_errors("listing kinds")
    def kinds(self) -> list[str]:
        """The kinds there are, in order."""
        return sorted(kind for kind in self._documents.distinct("type_id") if self.identifiers(kind))

    @driver_errors("looking for users")
    def users(self, uuid: str) -> list[dict[str, Any]]:
        """The visible documents that refer to a uuid."""
        return [document for document in self._documents.find({"refs": uuid}) if self._visible(document)]

    @driver_errors("looking for users")
    def names_blob(self, name: str) -> bool:
        """Whether a document, visible or not, names a blob."""
        return self._documents.find_one({"blobs": name}, {"_id": 1}) is not None

    @driver_errors("removing a component")
    def remove(self, uuid: str) -> None:
        """Remove a document. Who calls it has checked that nothing needs it."""
        self._documents.delete_one({"_id": uuid})

    def _checked(self, document: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if document is None else self._read(document)

    def _read(self, document: dict[str, Any]) -> dict[str, Any]:
        check_format(document, KIND)
        self._trust.check(document, kind=KIND)
        return document

    def _named(self, type_id: str, identifier: str, **more: Any) -> Iterator[dict[str, Any]]:
        found = self._documents.find({"type_id": type_id, "identifier": identifier, **more})
        return (document for document in found.sort("version", -1) if self._visible(document))

    def _visible(self, document: Mapping[str, Any]) -> bool:
        anchor = document.get("anchor")
        if anchor is None:
            return True
        # The anchor must refer back: what an earlier try of the same publication left stays invisible.
        return self._documents.find_one({"_id": anchor, "refs": document["_id"]}, {"_id": 1}) is not None
