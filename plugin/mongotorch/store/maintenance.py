"""Removes what nothing reaches (`GarbageCollector`), and finds what is broken (`Verifier`).

Reachable is what a visible component names, what a component names whose publication is still under way, and what
the checkpoints of unfinished jobs name. Anything else is removed once it was unreachable for the grace period:

- a blob, when nobody has touched it for that long (a writer touches a blob before a record names it): it is
  marked, then looked for in uses and records again, and removed soon after the mark or not at all (`blobs.py`);
- chunks without a file, and a component whose anchor never appeared, when an earlier collection recorded them in
  `mt.garbage` and the grace period has passed since;
- the checkpoints of jobs that ended that long ago, but for those that hold a trained model that could not be
  published: they stay until the job is run again, or removed.

Plans, which say how streams cut a select into ranges, are removed when nobody has used them for 30 days, and no
job that is unfinished can have.

Jobs that ended longer ago than they are to be kept go with their measurements, but for those of versions that are
still there and of trained models that could not be published.

Guarantees: a collection that dies at any write leaves only what the next one removes; nothing is removed that is
visible or could become visible, unless a publication sleeps for the whole grace period between two writes. The
verifier changes nothing and unpickles nothing, and one broken record does not hide another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, final

from bson import ObjectId

from mongotorch.codecs import NEWER, WRITTEN, check_format
from mongotorch.errors import MongotorchError, SettingError
from mongotorch.mongo.driver_errors import driver_errors
from mongotorch.mongo.server_features import Later, Now, clock_of, records
from mongotorch.store.aliases import COLLECTION as ALIASES
from mongotorch.store.aliases import KIND as ALIAS
from mongotorch.store.aliases import Move
from mongotorch.store.blobs import BUCKET, REMOVAL_S, REMOVING, USES, BlobStore
from mongotorch.store.checkpoints import COLLECTION as CHECKPOINTS
from mongotorch.store.checkpoints import KIND as CHECKPOINT
from mongotorch.store.checkpoints import OVER
from mongotorch.store.components import COLLECTION as COMPONENTS
from mongotorch.store.components import KIND
from mongotorch.store.jobs import COLLECTION as JOBS
from mongotorch.store.jobs import FINAL_STATUSES
from mongotorch.store.metrics import COLLECTION as METRICS
from mongotorch.store.predictions import COLLECTION as PREDICTIONS
from mongotorch.store.signing import FIELD, Trust

COLLECTION: Final = "mt.garbage"
GRACE_S: Final = 3600.0
PLANS_KEPT_S: Final = 30 * 24 * 3600.0
"""How long a plan that nobody uses is kept, in seconds."""
_PLANS: Final = "mt.plans"  # `data` stores them
_REMOVER: Final = "remover"  # in the document of a blob: which removal has marked it
_AT_ONCE: Final = 500  # blobs that are marked and removed together, or jobs
_JOBS_A_REPLY: Final = 5_000  # few enough that the server still knows the cursor when they are removed
_SHOWN: Final = 5  # records that a warning names
_log = logging.getLogger("mongotorch.store")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collected:
    """What a collection removed, or would have removed.

    Attributes:
        blobs: The names of blobs.
        nbytes: How many bytes those blobs have.
        uploads: Uploads that never ended, by the `files_id` of their chunks.
        components: The uuids of documents that never became visible.
        checkpoints: The ids of checkpoints of jobs that have ended.
        plans: The digests of plans that nobody has used for 30 days.
        jobs: How many jobs, with their measurements, were older than they are kept.
        waiting: How many more things are unreachable, for less than the grace period so far.
    """

    blobs: tuple[str, ...] = ()
    nbytes: int = 0
    uploads: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    plans: tuple[str, ...] = ()
    jobs: int = 0
    waiting: int = 0


@final
class GarbageCollector:
    """Removes what nothing reaches from one database.

    Args:
        database: The driver's database.
        grace_s: How long something must have been unreachable, in seconds. 0 is for a database that nobody writes
            to.
        keep_jobs_s: How long jobs that ended, and what they measured, are kept, in seconds; None: for ever.
        now: A clock instead of the server's, naive UTC; for tests.
    """

    def __init__(
        self, database: Any, *, grace_s: float = GRACE_S, keep_jobs_s: float | None = None, now: Now | None = None
    ) -> None:
        self._files, self._chunks = records(database, f"{BUCKET}.files"), records(database, f"{BUCKET}.chunks")
        self._components, self._checkpoints = records(database, COMPONENTS), records(database, CHECKPOINTS)
        self._jobs, self._unreachable = records(database, JOBS), records(database, COLLECTION)
        self._plans, self._predictions = records(database, _PLANS), records(database, PREDICTIONS)
        self._metrics, self._uses = records(database, METRICS), records(database, USES)
        self._grace_s, self._keep_jobs_s = grace_s, keep_jobs_s
        self._clock = clock_of(database, now)

    @driver_errors("collecting garbage")
    def collect(self, *, dry_run: bool = False) -> Collected:
        """Remove what was unreachable for the grace period.

        Args:
            dry_run: Only report what would be removed; nothing is written.

        Raises:
            FormatError: A newer release writes here, whose records may name blobs in another way; nothing was
                removed.
        """
        self._refuse_newer()
        components, young_components = self._overdue("component", self._unpublished(), dry_run)
        checkpoints = self._ended_checkpoints()
        if not dry_run:
            self._components.delete_many({"_id": {"$in": components}})
            self._forget("component", components)
            self._checkpoints.delete_many({"_id": {"$in": checkpoints}})
        blobs, nbytes, young_blobs = self._collect_blobs(set(components), set(checkpoints), dry_run)
        uploads, young_uploads = self._overdue("upload", self._abandoned_uploads(), dry_run)
        if not dry_run:
            for upload in uploads:
                self._chunks.delete_many({"files_id": upload})
            self._forget("upload", uploads)
            self._forget_predictions()
        return Collected(
            jobs=0 if self._keep_jobs_s is None else self._remove_jobs(self._keep_jobs_s, dry_run),
            blobs=tuple(blobs),
            nbytes=nbytes,
            uploads=tuple(map(str, uploads)),
            components=tuple(components),
            checkpoints=tuple(map(str, checkpoints)),
            plans=tuple(self._collect_plans(dry_run)),
            waiting=young_components + young_blobs + young_uploads,
        )

    def _forget_predictions(self) -> None:
        """Remove the records of predictions by versions that are gone; the documents keep the predictions."""
        for version in self._predictions.distinct("uuid"):
            if self._components.find_one({"_id": version}, {"_id": 1}) is None:
                self._predictions.delete_many({"uuid": version})

    def _refuse_newer(self) -> None:
        for collection in (self._components, self._checkpoints, self._jobs):
            found = collection.find_one(NEWER, {"format": 1})
            if found is not None:
                check_format(found, collection.name)

    def _unpublished(self) -> list[str]:
        """The components whose anchor is missing or refers to another one, and whose job has ended."""
        found = []
        for document in self._components.find({"anchor": {"$type": "string"}}, {"anchor": 1, "job": 1}):
            anchor = {"_id": document["anchor"], "refs": document["_id"]}
            if self._components.find_one(anchor, {"_id": 1}) is None and not self._is_open(document.get("job")):
                found.append(document["_id"])
        return found

    def _remove_jobs(self, keep_s: float, dry_run: bool) -> int:
        """Remove the jobs that ended that long ago, measurements first; how many."""
        too_old = {"finished": {"$lte": self._clock.now() - timedelta(seconds=keep_s)}}
        ended = {"status": {"$in": sorted(FINAL_STATUSES)}, **too_old}
        found = (job["_id"] for job in self._jobs.find(ended, {"_id": 1}, batch_size=_JOBS_A_REPLY))
        removed = 0
        while ids := list(itertools.islice(found, _AT_ONCE)):
            # A version keeps its job, and what was measured for it. The index of components holds only jobs that
            # are text: without `$type` the server does not see that it has these.
            kept = set(self._components.distinct("job", {"job": {"$in": ids, "$type": "string"}}))
            kept.update(self._checkpoints.distinct("job", {"job": {"$in": ids}}))
            gone = {"$in": [job for job in ids if job not in kept]}
            if not dry_run:
                self._metrics.delete_many({"job": gone})
                self._jobs.delete_many({"_id": gone, **ended})  # unless they were queued again meanwhile
            removed += len(gone["$in"])
        return removed

    def _is_open(self, job: Any) -> bool:
        unfinished = {"_id": job, "status": {"$nin": sorted(FINAL_STATUSES)}}
        return job is not None and self._jobs.find_one(unfinished, {"_id": 1}) is not None

    def _ended_checkpoints(self) -> list[Any]:
        """The checkpoints of jobs that are gone, or ended a grace period ago."""
        found = []
        ended = {"status": {"$in": sorted(FINAL_STATUSES)}, **self._clock.due("finished", seconds=self._grace_s)}
        unpublished = self._checkpoints.distinct("job", {f"run.{OVER}": True})
        for job in self._checkpoints.distinct("job"):
            exists = self._jobs.find_one({"_id": job}, {"_id": 1}) is not None
            where = {"$nor": [{"status": "failed"}]} if job in unpublished else {}
            if not exists or self._jobs.find_one({"_id": job, **ended, **where}, {"_id": 1}) is not None:
                found += [checkpoint["_id"] for checkpoint in self._checkpoints.find({"job": job}, {"_id": 1})]
        return found

    def _collect_plans(self, dry_run: bool) -> list[str]:
        """Remove the plans that nobody uses any more; their digests."""
        if not dry_run:  # those of earlier releases do not say when they were used
            with self._clock.alone():
                unused = {"used": {"$exists": False}}
                self._plans.update_many(unused, self._clock.update({"used": Later()}))
        unfinished = {"status": {"$nin": sorted(FINAL_STATUSES)}}
        oldest = self._jobs.find_one(unfinished, {"created": 1}, sort=[("created", 1)])
        due = {"$and": [{"used": {"$exists": True}}, self._clock.due("used", seconds=PLANS_KEPT_S)]}
        if oldest is not None:
            due["$and"].append({"used": {"$lt": oldest["created"]}})
        removed = []
        for plan in list(self._plans.find(due, {"_id": 1})):
            # Under the condition: who uses it meanwhile keeps it.
            with self._clock.alone():
                done = dry_run or self._plans.delete_one({"_id": plan["_id"], **due}).deleted_count
            removed += [plan["_id"]] if done else []
        return removed

    def _collect_blobs(
        self, components: set[str], checkpoints: set[Any], dry_run: bool
    ) -> tuple[list[str], int, int]:
        """Remove blobs that only these records, or none, name; their names and bytes, and how many are young."""
        # First what is old, then what is used or reachable: what is named in between was touched in between.
        due = self._clock.due("touched", seconds=self._grace_s)
        old = list(self._files.find(due, {"filename": 1, "length": 1}))
        used = self._used({})
        reachable = self._reachable(components, checkpoints)
        unreachable = [file for file in old if file["filename"] not in reachable]
        unused = [file for file in unreachable if file["filename"] not in used]
        removed = unused
        if not dry_run:
            parts = [unused[start : start + _AT_ONCE] for start in range(0, len(unused), _AT_ONCE)]
            removed = [file for part in parts for file in self._remove_blobs(part)]
            self._uses.delete_many(due)
        seen = {file["filename"] for file in old} | reachable
        young = sum(1 for file in self._files.find({}, {"filename": 1}) if file["filename"] not in seen)
        young += len(unreachable) - len(unused)
        return [file["filename"] for file in removed], sum(file["length"] for file in removed), young

    def _used(self, where: dict[str, Any]) -> set[str]:
        """The blobs that were touched within the grace period, of the uses that match."""
        young = {"$nor": [self._clock.due("touched", seconds=self._grace_s)], **where}
        return {name for use in self._uses.find(young, {"blobs": 1}) for name in use["blobs"]}

    def _remove_blobs(self, files: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Mark some blobs, see once more that nobody needs them, and remove them; those that were removed."""
        names, mine = [file["filename"] for file in files], {_REMOVER: ObjectId()}
        ids, stop = {"_id": {"$in": [file["_id"] for file in files]}}, {"$unset": {REMOVING: "", _REMOVER: ""}}
        # What earlier releases touch has the time in the blob's own document.
        due = self._clock.due("touched", seconds=self._grace_s)
        with self._clock.alone():
            self._files.update_many({**ids, **due}, self._clock.update({REMOVING: Later(), **mine}))
            # In this order: whoever uses one and did not see the mark has said so by now.
            needed = self._used({"blobs": {"$in": names}})
            for collection in (self._components, self._checkpoints):
                for document in collection.find({"blobs": {"$in": names}}, {"blobs": 1}):
                    needed |= set(document["blobs"])
            self._files.update_many({**mine, "filename": {"$in": sorted(needed & set(names))}}, stop)
            marked = {file["_id"] for file in self._files.find(mine, {"_id": 1})}
            late = self._clock.due(REMOVING, seconds=REMOVAL_S)  # a writer does not wait for longer
            self._files.delete_many({**mine, **due, "$nor": [late]})
            kept = {file["_id"] for file in self._files.find(mine, {"_id": 1})}
            self._files.update_many(mine, stop)
        self._chunks.delete_many({"files_id": {"$in": sorted(marked - kept, key=str)}})
        return [file for file in files if file["_id"] in marked - kept]

    def _reachable(self, components: set[str], checkpoints: set[Any]) -> set[str]:
        """The blobs that a record names, without these records."""
        names: set[str] = set()
        for collection, without in ((self._components, components), (self._checkpoints, checkpoints)):
            for document in collection.find({}, {"blobs": 1}):
                if document["_id"] not in without:
                    names.update(document.get("blobs", ()))
        return names

    def _abandoned_uploads(self) -> list[Any]:
        """The `files_id` of chunks without a file; each file is looked for after its chunk was seen."""
        # Sorted as the index is, the server skips from file to file in it, and reads no chunk.
        first = [{"$sort": {"files_id": 1, "n": 1}}, {"$group": {"_id": "$files_id", "n": {"$first": "$n"}}}]
        ids = (group["_id"] for group in self._chunks.aggregate(first))
        return [file_id for file_id in ids if self._files.find_one({"_id": file_id}, {"_id": 1}) is None]

    def _overdue(self, kind: str, found: list[Any], dry_run: bool) -> tuple[list[Any], int]:
        """Those that an earlier collection recorded a grace period ago, and how many others there are."""
        records = {f"{kind}:{each}": each for each in found}
        if not dry_run:
            known = {record["_id"] for record in self._unreachable.find({}, {"_id": 1})}
            for name in sorted(records.keys() - known):
                with self._clock.alone():
                    update = self._clock.update({**WRITTEN, "kind": kind, "seen": Later()})
                    self._unreachable.update_one({"_id": name}, update, upsert=True)
            # What has become reachable, or is gone, starts anew if it ever comes back.
            self._unreachable.delete_many({"kind": kind, "_id": {"$nin": sorted(records)}})
        due = {"kind": kind, **self._clock.due("seen", seconds=self._grace_s)}
        old = self._unreachable.find(due, {"_id": 1})
        overdue = [records[record["_id"]] for record in old if record["_id"] in records]
        if dry_run and self._grace_s == 0:
            overdue = found
        return overdue, len(found) - len(overdue)

    def _forget(self, kind: str, removed: list[Any]) -> None:
        self._unreachable.delete_many({"_id": {"$in": [f"{kind}:{each}" for each in removed]}})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verified:
    """What was checked, and what was found.

    Attributes:
        blobs: How many blobs were read and hashed.
        nbytes: How many bytes that was.
        components: How many component documents were checked.
        aliases: How many moves of aliases were checked.
        problems: One sentence for each thing that is broken; empty if nothing is.
        repaired: The names of blobs whose bytes were put back.
    """

    blobs: int
    nbytes: int
    components: int
    aliases: int
    problems: tuple[str, ...]
    repaired: tuple[str, ...] = ()


class _Stranded:
    """The records that are signed with keys which are not accepted."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {}

    def add(self, document: Mapping[str, Any], kind: str) -> None:
        key = str(document[FIELD].get("key"))[:40]
        self._counts[key] += 1
        names = self._names.setdefault(key, [])
        if len(names) < _SHOWN:
            number = f" version {document['version']}" if "version" in document else ""
            name = document.get("identifier", document.get("job", document.get("_id")))
            names.append(f"{document.get('type_id', kind)} {name!r}{number}")

    def log(self) -> None:
        for key, count in sorted(self._counts.items()):
            more = ", …" * (count > _SHOWN)
            _log.warning(
                "%d record(s) are signed with the key %s, which is not accepted, and trust='signed' refuses them: "
                "%s%s; put that key behind the first one, and sign again",
                *(count, key, ", ".join(self._names[key]), more),
            )


@final
class Verifier:
    """Checks everything that is stored in one database, and signs it again.

    Args:
        database: The driver's database.
        trust: Checks signatures; None checks none.
    """

    def __init__(self, database: Any, trust: Trust | None = None) -> None:
        self._documents, self._moves = records(database, COMPONENTS), records(database, ALIASES)
        self._checkpoints = records(database, CHECKPOINTS)
        self._blobs = BlobStore(database)
        self._trust = trust

    @driver_errors("verifying")
    def verify(self, *, copies: Path | None = None) -> Verified:
        """Read and hash every blob, and check every component, its blobs, and the history of every alias.

        Args:
            copies: A folder. Blobs that are damaged or missing, and whose bytes a file in it has, under whatever
                name, are put back; None changes nothing.
        """
        problems: list[str] = []
        names = list(self._blobs.names())
        sizes = {name: self._size(name) for name in names}
        wrong = {name for name, size in sizes.items() if size is None}
        wrong |= {name for each in self._documents.find({}, {"blobs": 1}) for name in each.get("blobs", ())} - {
            *names
        }
        repaired = () if copies is None or not wrong else tuple(self._put_back(wrong, copies))
        for name in wrong & sizes.keys():
            sizes[name] = self._read(name, problems)
        known, components = {*names, *repaired}, 0
        for document in self._documents.find():
            components += 1
            self._check(document, known, problems)
        aliases = self._check_aliases(problems)
        return Verified(
            blobs=len(names),
            nbytes=sum(size or 0 for size in sizes.values()),
            components=components,
            aliases=aliases,
            problems=tuple(problems),
            repaired=repaired,
        )

    @driver_errors("signing again")
    def resign(self) -> int:
        """Sign with the first key what another accepted key has signed; how many records that were.

        What no accepted key has signed stays as it is; the log says which records those are, by key: with
        `trust="signed"` they are refused until that key is accepted again.

        Raises:
            SettingError: No key can sign.
            TrustError: A record was changed since it was signed; those before it are signed again.
        """
        if self._trust is None or self._trust.signing is None:
            raise SettingError(
                "signing again needs a key that signs: set MONGOTORCH_SIGNING_KEY", setting="signing_key"
            )
        trust, signing = dataclasses.replace(self._trust, required=False), self._trust.signing
        count, stranded = 0, _Stranded()
        for collection, kind in ((self._documents, KIND), (self._moves, ALIAS), (self._checkpoints, CHECKPOINT)):
            for document in collection.find({FIELD: {"$exists": True}}):
                key = trust.check_signer(document, kind=kind)
                if key is None:
                    stranded.add(document, kind)
                elif key.key_id != signing.key_id:
                    trust.check(document, kind=kind)
                    new = trust.sign(document, kind=kind)[FIELD]
                    same = {"_id": document["_id"], FIELD: document[FIELD]}
                    count += collection.update_one(same, {"$set": {FIELD: new}}).modified_count
        stranded.log()
        return count

    def _put_back(self, names: set[str], copies: Path) -> Iterator[str]:
        """Store the bytes of these blobs that files of a folder have."""
        for path in sorted(each for each in copies.rglob("*") if each.is_file()):
            with path.open("rb") as file:
                name = hashlib.file_digest(file, "sha256").hexdigest()
            if name in names:
                data = path.read_bytes()
                if not self._blobs.mend(data):
                    self._blobs.put(data)
                yield name

    def _size(self, name: str) -> int | None:
        try:
            return len(self._blobs.get(name))
        except MongotorchError:
            return None

    def _read(self, name: str, problems: list[str]) -> int:
        try:
            return len(self._blobs.get(name))
        except MongotorchError as error:
            problems.append(error.message)
            return 0

    def _check(self, document: dict[str, Any], known: set[str], problems: list[str]) -> None:
        try:
            check_format(document, KIND)
            if self._trust is not None:
                self._trust.check(document, kind=KIND)
        except MongotorchError as error:
            problems.append(error.message)
        name = f"{document.get('type_id')} {document.get('identifier')!r} version {document.get('version')}"
        problems += [
            f"{name} ({document['_id']}) names the blob {blob}, which is not there"
            for blob in document.get("blobs", ())
            # A blob may have been stored after the list was read.
            if blob not in known and not self._blobs.has(blob)
        ]

    def _check_aliases(self, problems: list[str]) -> int:
        count = 0
        newest: dict[str, dict[str, Any]] = {}
        for document in self._moves.find().sort("n", 1):
            count += 1
            name = f"{document.get('alias')!r} of {document.get('type_id')} {document.get('identifier')!r}"
            try:
                check_format(document, ALIAS)
                if self._trust is not None:
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
            target = {"_id": head.get("to"), "type_id": head.get("type_id"), "identifier": head.get("identifier")}
            if head.get("to") is not None and self._documents.find_one(target, {"_id": 1}) is None:
                problems.append(f"alias {name} names {head.get('to')}, which is not there")
        return count
