"""Stores the checkpoints of running jobs: the two newest training states of each.

Guarantees: a checkpoint is visible only when all of its blobs are stored; a worker that has lost its job writes
none; `newest` prefers a later attempt over a later step of an earlier one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, final

from pymongo import IndexModel

from mongotorch.codecs import WRITTEN, check_format
from mongotorch.errors import IntegrityError
from mongotorch.mongo.driver_errors import repeated
from mongotorch.mongo.server_features import ensure_indexes, records
from mongotorch.store.blobs import BlobStore
from mongotorch.store.jobs import COLLECTION as JOBS
from mongotorch.store.jobs import running
from mongotorch.store.signing import Trust

COLLECTION: Final = "mt.checkpoints"
KIND: Final = "checkpoint"
KEPT: Final = 2  # there is one while the next is written
OVER: Final = "over"
"""The key in `run` of the checkpoint of a run that has made its last step, and could not be published."""
_NEWEST: Final = [("attempt", -1), ("step", -1)]


@final
class Checkpoints:
    """The checkpoint documents of one database.

    Args:
        database: The driver's database.
        trust: Signs and verifies them, since a state may contain pickles; None does neither.
    """

    def __init__(self, database: Any, trust: Trust | None = None) -> None:
        self._documents = records(database, COLLECTION)
        self._jobs = records(database, JOBS)
        self._blobs = BlobStore(database)
        self._trust = trust

    @repeated("preparing the checkpoints")
    def ensure_indexes(self) -> None:
        """Create the indexes if they do not exist."""
        ensure_indexes(self._documents, IndexModel([("job", 1), *_NEWEST]))

    @repeated("writing a checkpoint")
    def put(
        self,
        job: str,
        attempt: int,
        step: int,
        body: Mapping[str, Any],
        blobs: Iterable[str],
        *,
        run: Mapping[str, Any] | None = None,
    ) -> bool:
        """Write a checkpoint, and drop all but the two newest of its job.

        Args:
            job: The job's id.
            attempt: The fencing token of the claim.
            step: The number of optimizer steps taken.
            body: The state, encoded.
            blobs: The names of all blobs that the state refers to; they are stored already.
            run: What was decided before the first step and holds for the whole run, as plain BSON.

        Returns:
            False: the job no longer runs under this attempt, and nothing was written.

        Raises:
            IntegrityError: A blob is not stored.
        """
        if self._jobs.find_one(running(job, attempt), {"_id": 1}) is None:
            return False
        names = sorted(set(blobs))
        missing = self._blobs.touch(names)
        if missing:
            raise IntegrityError(
                f"the checkpoint of job {job} at step {step} names blobs that are gone: {missing}"
            )
        document = {
            "_id": f"{job}:{attempt}:{step}",
            **WRITTEN,
            "job": job,
            "attempt": attempt,
            "step": int(step),
            "body": dict(body),
            "run": dict(run or {}),
            "blobs": names,
        }
        if self._trust is not None:
            document = self._trust.sign(document, kind=KIND)
        self._documents.replace_one({"_id": document["_id"]}, document, upsert=True)
        older = self._documents.find({"job": job}, {"_id": 1}).sort(_NEWEST).skip(KEPT)
        self._documents.delete_many({"_id": {"$in": [checkpoint["_id"] for checkpoint in older]}})
        return True

    @repeated("reading a checkpoint")
    def newest(self, job: str) -> dict[str, Any] | None:
        """The document to resume a job from; None where there is none. Raises: TrustError, FormatError."""
        found: dict[str, Any] | None = self._documents.find_one({"job": job}, sort=_NEWEST)
        if found is not None:
            check_format(found, KIND)
            if self._trust is not None:
                self._trust.check(found, kind=KIND)
        return found

    @repeated("reading a checkpoint")
    def is_over(self, job: str) -> bool:
        """Whether a checkpoint of a job is that of a run that only has to be published."""
        return self._documents.find_one({"job": job, f"run.{OVER}": True}, {"_id": 1}) is not None

    @repeated("dropping checkpoints")
    def drop(self, job: str) -> int:
        """Drop the checkpoints of a job, and return how many; garbage collection removes their blobs."""
        return int(self._documents.delete_many({"job": job}).deleted_count)
