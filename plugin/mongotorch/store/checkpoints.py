"""Where a run has got to: the last two states of each running job.

Always: a checkpoint is visible when all its blobs are stored; who has lost the job writes none; of one job the
last two are kept, so that there is one while the next is written; a later attempt's go before an earlier one's,
and what `newest` gives is whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, final

from mongotorch.codecs import WRITTEN, check_format
from mongotorch.errors import IntegrityError
from mongotorch.mongo.error_translation import driver_errors
from mongotorch.mongo.server_features import ensure_index
from mongotorch.store.blobs import BlobStore
from mongotorch.store.jobs import COLLECTION as JOBS
from mongotorch.store.signing import Trust

COLLECTION: Final = "mt.checkpoints"
KIND: Final = "checkpoint"
KEPT: Final = 2
_NEWEST: Final = [("attempt", -1), ("step", -1)]


@final
class Checkpoints:
    """The checkpoint documents of one database.

    Args:
        database: The driver's database.
        trust: Signs and checks them, since a state may hold pickles; None does neither.
    """

    def __init__(self, database: Any, trust: Trust | None = None) -> None:
        self._documents = database[COLLECTION]
        self._jobs = database[JOBS]
        self._artifacts = BlobStore(database)
        self._trust = trust or Trust()

    @driver_errors("preparing the checkpoints")
    def ensure_indexes(self) -> None:
        """Make the indexes that the promises rest on; does nothing where they are there."""
        ensure_index(self._documents, [("job", 1), *_NEWEST])

    @driver_errors("writing a checkpoint")
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
        """Write a checkpoint, and drop all but the last two of its job.

        Args:
            job: The job's id.
            attempt: The token of the claim.
            step: After how many optimizer steps.
            body: The state, plain; large parts are blobs.
            blobs: The names of all blobs that it refers to, stored already.
            run: What holds for the whole run, from before its first step; plain BSON.

        Returns:
            False: the job is no longer held under this attempt, and nothing was written.

        Raises:
            IntegrityError: A blob is not there.
        """
        if not self._is_held(job, attempt):
            return False
        names = sorted(set(blobs))
        missing = self._artifacts.touch(names)  # from here on `gc` lets them be, for its grace
        if missing:
            raise IntegrityError(
                f"the checkpoint of job {job} at step {step} names blobs that are gone: {missing}"
            )
        key = {"job": job, "attempt": attempt, "step": int(step)}
        said = {
            "_id": f"{job}:{attempt}:{step}",
            **WRITTEN,
            **key,
            "body": dict(body),
            "run": dict(run or {}),
            "blobs": names,
        }
        self._documents.replace_one({"_id": said["_id"]}, self._trust.sign(said, kind=KIND), upsert=True)
        older = self._documents.find({"job": job}, {"_id": 1}).sort(_NEWEST).skip(KEPT)
        self._documents.delete_many({"_id": {"$in": [checkpoint["_id"] for checkpoint in older]}})
        return True

    @driver_errors("reading a checkpoint")
    def newest(self, job: str) -> dict[str, Any] | None:
        """The document to go on from; None where there is none. Raises: TrustError, FormatError."""
        found: dict[str, Any] | None = self._documents.find_one({"job": job}, sort=_NEWEST)
        if found is not None:
            check_format(found, KIND)
            self._trust.check(found, kind=KIND)
        return found

    @driver_errors("dropping checkpoints")
    def drop(self, job: str) -> int:
        """Drop the checkpoints of a job; their blobs go with the next `gc`. How many there were."""
        return int(self._documents.delete_many({"job": job}).deleted_count)

    def _is_held(self, job: str, attempt: int) -> bool:
        held = {"_id": job, "attempt": attempt, "status": "running"}
        return self._jobs.find_one(held, {"_id": 1}) is not None
