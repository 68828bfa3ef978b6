"""The component documents: one a version, and the one insert that publishes it.

Always: two at once never get one version number (the index decides, the loser takes the next); a document is
never changed after its insert; a document with an `anchor` is visible only when the component of that uuid
is, so that the insert of the anchor publishes both; what is invisible is in nobody's way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, final

from pymongo.errors import DuplicateKeyError

from mongotorch.errors import ConflictError, NotFoundError

COLLECTION = "mt.components"


@final
class Components:
    """The component documents of one database.

    Args:
        database: The driver's database.
    """

    def __init__(self, database: Any) -> None:
        self._documents = database[COLLECTION]

    def ensure_indexes(self) -> None:
        """Make the indexes that the promises rest on; does nothing where they are there."""
        self._documents.create_index([("type_id", 1), ("identifier", 1), ("version", 1)], unique=True)

    def publish(self, document: Mapping[str, Any]) -> int:
        """Insert a document under the next free version number.

        Returns:
            The version number, from 0.

        Raises:
            ConflictError: Its `_id` is taken.
        """
        name = {"type_id": document["type_id"], "identifier": document["identifier"]}
        while True:
            last = self._documents.find_one(name, {"version": 1}, sort=[("version", -1)])
            version = 0 if last is None else last["version"] + 1
            try:
                self._documents.insert_one({**document, "version": version})
            except DuplicateKeyError as error:
                # Either somebody took the number, and there is a next one, or the uuid is taken for ever.
                if self._documents.find_one({"_id": document["_id"]}, {"_id": 1}) is not None:
                    raise ConflictError(
                        f"uuid {document['_id']} is taken; give the component a uuid of its own", field="uuid"
                    ) from error
                continue
            return version

    def peek(self, uuid: str) -> dict[str, Any] | None:
        """The visible document of a uuid, None where there is none."""
        found = self._documents.find_one({"_id": uuid})
        return found if found is not None and self._visible(found) else None

    def get(self, uuid: str) -> dict[str, Any]:
        """The visible document of a uuid. Raises: NotFoundError."""
        found = self.peek(uuid)
        if found is None:
            raise NotFoundError(f"no component with uuid {uuid}")
        return found

    def find(self, type_id: str, identifier: str, version: int | None = None) -> dict[str, Any]:
        """The document of a name, its newest version unless one is given.

        Raises:
            NotFoundError: There is none; the message names the versions there are.
        """
        found = next(self._named(type_id, identifier, **({} if version is None else {"version": version})), None)
        if found is None:
            there = self.versions(type_id, identifier)
            wanted = f"version {version} of {type_id} {identifier!r}" if there else f"{type_id} {identifier!r}"
            raise NotFoundError(f"no {wanted}" + (f"; there are {there}" if there else ""))
        return found

    def newest(self, type_id: str, identifier: str) -> dict[str, Any] | None:
        """The document of the newest visible version, None where there is none."""
        return next(self._named(type_id, identifier), None)

    def by_digest(self, type_id: str, identifier: str, digest: str) -> dict[str, Any] | None:
        """The newest visible version with this content, None where there is none."""
        return next(self._named(type_id, identifier, digest=digest), None)

    def versions(self, type_id: str, identifier: str) -> list[int]:
        """The visible version numbers, ascending."""
        return sorted(document["version"] for document in self._named(type_id, identifier))

    def identifiers(self, type_id: str) -> list[str]:
        """The identifiers of a kind that have a visible version, in order."""
        names = self._documents.distinct("identifier", {"type_id": type_id})
        return sorted(name for name in names if self.newest(type_id, name) is not None)

    def kinds(self) -> list[str]:
        """The kinds there are, in order."""
        return sorted(kind for kind in self._documents.distinct("type_id") if self.identifiers(kind))

    def users(self, uuid: str) -> list[dict[str, Any]]:
        """The visible documents that refer to a uuid."""
        return [document for document in self._documents.find({"refs": uuid}) if self._visible(document)]

    def names_blob(self, name: str) -> bool:
        """Whether a document, visible or not, names a blob."""
        return self._documents.find_one({"blobs": name}, {"_id": 1}) is not None

    def remove(self, uuid: str) -> None:
        """Remove a document. Who calls it has checked that nothing needs it."""
        self._documents.delete_one({"_id": uuid})

    def _named(self, type_id: str, identifier: str, **more: Any) -> Iterator[dict[str, Any]]:
        found = self._documents.find({"type_id": type_id, "identifier": identifier, **more})
        return (document for document in found.sort("version", -1) if self._visible(document))

    def _visible(self, document: Mapping[str, Any]) -> bool:
        anchor = document.get("anchor")
        if anchor is None:
            return True
        # The anchor must refer back: what an earlier try of the same publication left stays invisible.
        return self._documents.find_one({"_id": anchor, "refs": document["_id"]}, {"_id": 1}) is not None
