"""What nothing reaches is collected: what a run that died left behind, and what a removed version alone used.

Reached is what a visible component names, what a document names whose publication is still under way, and what
the checkpoints of unfinished jobs name. Everything else is collected when it has been unreached for the grace:

- a blob, when nobody has touched it for so long (whoever is going to refer to it touches it first), on the
  condition, in the delete itself, that nobody touches it meanwhile;
- chunks without a file, and a document whose anchor never appeared, when an earlier collection has marked them
  and the grace has passed since, so that nobody's clock but the server's counts;
- the checkpoints of jobs that ended so long ago.

Always: a collection that dies at any write leaves only garbage that the next one collects; nothing is removed
that is visible or could become it, as long as no publication sleeps for the whole grace between two writes.

Looks at everything that is stored, and says what is not what it should be.

Always: nothing is changed; nothing is unpickled; one broken thing does not hide another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Final, final

from mongotorch.codecs import NEWER, WRITTEN, check_format
from mongotorch.errors import MongotorchError
from mongotorch.mongo.error_translation import driver_errors
from mongotorch.mongo.server_features import Later, Now, clock_of
from mongotorch.store.aliases import COLLECTION as ALIASES
from mongotorch.store.aliases import KIND as ALIAS
from mongotorch.store.aliases import Move
from mongotorch.store.blobs import BUCKET, BlobStore
from mongotorch.store.checkpoints import COLLECTION as CHECKPOINTS
from mongotorch.store.components import COLLECTION as COMPONENTS
from mongotorch.store.components import KIND
from mongotorch.store.jobs import COLLECTION as JOBS
from mongotorch.store.jobs import FINAL
from mongotorch.store.signing import Trust

COLLECTION: Final = "mt.garbage"
GRACE_S: Final = 3600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collected:
    """What a collection took away, or would have taken.

    Attributes:
        blobs: Names of blobs.
        nbytes: Bytes of those blobs.
        uploads: Uploads that never ended, by the `files_id` of their chunks.
        components: Uuids of documents that never became visible.
        checkpoints: Ids of checkpoints of jobs that have ended.
        waiting: How many more things are unreached, for less than the grace as yet.
    """

    blobs: tuple[str, ...] = ()
    nbytes: int = 0
    uploads: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    waiting: int = 0


@final
class GarbageCollector:
    """Collects in one database.

    Args:
        database: The driver's database.
        grace_s: For how long something must have been unreached, in seconds. 0 is for a database that nobody
            writes to.
        now: A clock instead of the server's, naive UTC; for tests.
    """

    def __init__(self, database: Any, *, grace_s: float = GRACE_S, now: Now | None = None) -> None:
        self._files, self._chunks = database[f"{BUCKET}.files"], database[f"{BUCKET}.chunks"]
        self._components, self._checkpoints = database[COMPONENTS], database[CHECKPOINTS]
        self._jobs, self._marks = database[JOBS], database[COLLECTION]
        self._grace_s = grace_s
        self._clock = clock_of(database, now)

    @driver_errors("collecting garbage")
    def collect(self, *, dry_run: bool = False) -> Collected:
        """Collect.

        Args:
            dry_run: Only say what would be collected; nothing is written, not even a mark.

        Raises:
            FormatError: A newer release writes here, whose records may name blobs in another way; nothing was
                collected.
        """
        self._refuse_newer()
        components, young = self._marked("component", self._unpublished(), dry_run)
        gone = self._remove_components(components, dry_run)
        checkpoints = self._ended_checkpoints()
        if not dry_run:
            self._checkpoints.delete_many({"_id": {"$in": checkpoints}})
        blobs, nbytes, recent = self._collect_blobs(gone, set(checkpoints), dry_run)
        uploads, later = self._marked("upload", self._fileless(), dry_run)
        if not dry_run:
            for upload in uploads:
                self._chunks.delete_many({"files_id": upload})
            self._forget("upload", uploads)
        return Collected(
            blobs=tuple(blobs),
            nbytes=nbytes,
            uploads=tuple(map(str, uploads)),
            components=tuple(gone),
            checkpoints=tuple(map(str, checkpoints)),
            waiting=young + recent + later,
        )

    def _refuse_newer(self) -> None:
        for collection in (self._components, self._checkpoints, self._jobs):
            found = collection.find_one(NEWER, {"format": 1})
            if found is not None:
                check_format(found, collection.name)

    def _unpublished(self) -> list[str]:
        """Documents whose anchor is not there or refers to another, and whose job will not go on."""
        found = []
        for document in self._components.find({"anchor": {"$type": "string"}}, {"anchor": 1, "job": 1}):
            anchor = {"_id": document["anchor"], "refs": document["_id"]}
            if self._components.find_one(anchor, {"_id": 1}) is None and not self._goes_on(document.get("job")):
                found.append(document["_id"])
        return found

    def _goes_on(self, job: Any) -> bool:
        unfinished = {"_id": job, "status": {"$nin": sorted(FINAL)}}
        return job is not None and self._jobs.find_one(unfinished, {"_id": 1}) is not None

    def _remove_components(self, uuids: list[Any], dry_run: bool) -> list[str]:
        if not dry_run:
            self._components.delete_many({"_id": {"$in": uuids}})
            self._forget("component", uuids)
        return uuids

    def _ended_checkpoints(self) -> list[Any]:
        found = []
        for job in self._checkpoints.distinct("job"):
            document = self._jobs.find_one({"_id": job}, {"status": 1})
            ended = {"_id": job, "status": {"$in": sorted(FINAL)}}
            over = {**ended, **self._clock.due("finished", seconds=self._grace_s)}
            if document is None or self._jobs.find_one(over, {"_id": 1}) is not None:
                found += [checkpoint["_id"] for checkpoint in self._checkpoints.find({"job": job}, {"_id": 1})]
        return found

    def _collect_blobs(
        self, without: Iterable[str], checkpoints: set[Any], dry_run: bool
    ) -> tuple[list[str], int, int]:
        # First what is old, then what is reached: what is referred to in between was touched in between.
        due = self._clock.due("touched", seconds=self._grace_s)
        old = list(self._files.find(due, {"filename": 1, "length": 1, "touched": 1}))
        reached = self._reached(set(without), checkpoints)
        garbage = [file for file in old if file["filename"] not in reached]
        taken = garbage if dry_run else [file for file in garbage if self._take(file)]
        names = [file["filename"] for file in taken]
        considered = {file["filename"] for file in old} | reached
        recent = sum(1 for file in self._files.find({}, {"filename": 1}) if file["filename"] not in considered)
        return names, sum(file["length"] for file in taken), recent

    def _take(self, file: dict[str, Any]) -> bool:
        # The condition is the protection: who re-uses the blob has changed `touched`.
        same = {"_id": file["_id"], "touched": file["touched"]}
        with self._clock.alone():
            taken = bool(self._files.delete_one(same).deleted_count)
        if taken:
            self._chunks.delete_many({"files_id": file["_id"]})
        return taken

    def _reached(self, without: set[str], checkpoints: set[Any]) -> set[str]:
        names: set[str] = set()
        for collection, out in ((self._components, without), (self._checkpoints, checkpoints)):
            for document in collection.find({}, {"blobs": 1}):
                if document["_id"] not in out:
                    names.update(document.get("blobs", ()))
        return names

    def _fileless(self) -> list[Any]:
        """The `files_id` of chunks that no file has; a file is looked for after its chunk was seen."""
        # Sorted as the index is, the server skips from file to file there, and reads no chunk.
        first = [{"$sort": {"files_id": 1, "n": 1}}, {"$group": {"_id": "$files_id", "n": {"$first": "$n"}}}]
        ids = (group["_id"] for group in self._chunks.aggregate(first))
        return [file_id for file_id in ids if self._files.find_one({"_id": file_id}, {"_id": 1}) is None]

    def _marked(self, kind: str, found: list[Any], dry_run: bool) -> tuple[list[Any], int]:
        """Those that an earlier mark has been on for the grace, and how many others there are."""
        wanted = {f"{kind}:{each}": each for each in found}
        if not dry_run:
            for name in self._unmarked(wanted):
                with self._clock.alone():
                    update = self._clock.update({**WRITTEN, "kind": kind, "seen": Later()})
                    self._marks.update_one({"_id": name}, update, upsert=True)
            # What is reached after all, or gone, starts anew if it ever comes back.
            self._marks.delete_many({"kind": kind, "_id": {"$nin": sorted(wanted)}})
        due = {"kind": kind, **self._clock.due("seen", seconds=self._grace_s)}
        ripe = [wanted[mark["_id"]] for mark in self._marks.find(due, {"_id": 1}) if mark["_id"] in wanted]
        if dry_run and self._grace_s == 0:
            ripe = found
        return ripe, len(found) - len(ripe)

    def _unmarked(self, wanted: Iterable[str]) -> Iterator[str]:
        marked = {mark["_id"] for mark in self._marks.find({}, {"_id": 1})}
        return (name for name in wanted if name not in marked)

    def _forget(self, kind: str, gone: list[Any]) -> None:
        self._marks.delete_many({"_id": {"$in": [f"{kind}:{each}" for each in gone]}})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verified:
    """What was looked at, and what was found.

    Attributes:
        blobs: How many blobs were read and hashed.
        nbytes: How many bytes that was.
        components: How many component documents were checked.
        aliases: How many moves of aliases were checked.
        problems: A sentence for each thing that is broken; empty is well.
    """

    blobs: int
    nbytes: int
    components: int
    aliases: int
    problems: tuple[str, ...]


@final
class Verifier:
    """Verifies one database.

    Args:
        database: The driver's database.
        trust: Checks signatures; None checks none.
    """

    def __init__(self, database: Any, trust: Trust | None = None) -> None:
        self._files = database[f"{BUCKET}.files"]
        self._documents, self._moves = database[COMPONENTS], database[ALIASES]
        self._artifacts = BlobStore(database)
        self._trust = trust or Trust()

    @driver_errors("verifying")
    def verify(self) -> Verified:
        """Read and hash every blob, check every component and its blobs, and the history of every alias."""
        problems: list[str] = []
        names = [file["filename"] for file in self._files.find({}, {"filename": 1})]
        nbytes = sum(self._read(name, problems) for name in names)
        there, components = set(names), 0
        for document in self._documents.find():
            components += 1
            self._check(document, there, problems)
        aliases = self._check_aliases(problems)
        return Verified(
            blobs=len(names), nbytes=nbytes, components=components, aliases=aliases, problems=tuple(problems)
        )

    def _read(self, name: str, problems: list[str]) -> int:
        try:
            return len(self._artifacts.get(name))
        except MongotorchError as error:
            problems.append(error.message)
            return 0

    def _check(self, document: dict[str, Any], there: set[str], problems: list[str]) -> None:
        try:
            check_format(document, KIND)
            self._trust.check(document, kind=KIND)
        except MongotorchError as error:
            problems.append(error.message)
        said = f"{document.get('type_id')} {document.get('identifier')!r} version {document.get('version')}"
        problems += [
            f"{said} ({document['_id']}) names the blob {name}, which is not there"
            for name in document.get("blobs", ())
            # A blob may have come after the list was read.
            if name not in there and not self._artifacts.has(name)
        ]

    def _check_aliases(self, problems: list[str]) -> int:
        count = 0
        newest: dict[str, dict[str, Any]] = {}
        for document in self._moves.find().sort("n", 1):
            count += 1
            name = f"{document.get('alias')!r} of {document.get('type_id')} {document.get('identifier')!r}"
            try:
                check_format(document, ALIAS)
                self._trust.check(document, kind=ALIAS)
                Move.from_document(document)
            except MongotorchError as error:
                problems.append(error.message)
            before = newest.get(name, {"n": 0})
            number = before["n"] + 1 if isinstance(before.get("n"), int) else None
            if document.get("n") != number or document.get("from") != before.get("to"):
                problems.append(f"alias {name}: a move is missing before {document['_id']}")
            newest[name] = document
        for name, head in newest.items():
            wanted = {"_id": head.get("to"), "type_id": head.get("type_id"), "identifier": head.get("identifier")}
            if head.get("to") is not None and self._documents.find_one(wanted, {"_id": 1}) is None:
                problems.append(f"alias {name} names {head.get('to')}, which is not there")
        return count
