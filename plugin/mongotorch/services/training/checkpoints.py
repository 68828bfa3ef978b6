"""Checkpoints of a run: written in the background, read back by whoever goes on with it.

Always: the run waits for the copy of its state and for nothing else; a checkpoint is visible when all of it is
stored; only the newest that waits is written; what a checkpoint could not write is raised in the run.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, final

from mongotorch.codecs import Codecs
from mongotorch.store import BlobStore, Checkpoints


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Resumed:
    """Where a run goes on.

    Attributes:
        state: What `Fit.capture` gave.
        run: What holds for the whole run.
        blobs: The blobs that `run` names, by name.
    """

    state: Mapping[str, Any]
    run: Mapping[str, Any]
    blobs: Mapping[str, bytes]


@final
class RunCheckpoints:
    """The checkpoints of one database.

    Args:
        checkpoints: The checkpoint documents.
        artifacts: The blobs.
        codecs: Write and read a state.
    """

    def __init__(self, checkpoints: Checkpoints, artifacts: BlobStore, codecs: Codecs) -> None:
        self._checkpoints, self._artifacts, self._codecs = checkpoints, artifacts, codecs

    def load(self, job_id: str) -> Resumed | None:
        """Where the newest checkpoint of a job's run goes on; None where there is none.

        Raises:
            IntegrityError: A blob is not what was stored.
        """
        found = self._checkpoints.newest(job_id)
        if found is None:
            return None
        state: dict[str, Any] = self._codecs.decode(found["body"], self._artifacts.get)
        run = found.get("run", {})
        return Resumed(
            state=state,
            run=run.get("said", {}),
            blobs={name: self._artifacts.get(name) for name in run.get("blobs", ())},
        )

    def run(self, job_id: str) -> dict[str, Any] | None:
        """What holds for the whole of a job's run, by its newest checkpoint; None where there is none."""
        found = self._checkpoints.newest(job_id)
        return None if found is None else found.get("run", {}).get("said", {})

    def save(
        self,
        job_id: str,
        attempt: int,
        state: Mapping[str, Any],
        *,
        run: Mapping[str, Any] | None = None,
        blobs: Mapping[str, bytes] | None = None,
    ) -> None:
        """Store a state, all of it before it becomes visible.

        Args:
            job_id: The job.
            attempt: The token of the claim.
            state: What changes from step to step.
            run: What does not: plain BSON.
            blobs: The blobs that `run` names, by name.
        """
        names = [self._artifacts.put(data) for data in (blobs or {}).values()]
        kept = {"said": dict(run or {}), "blobs": list(names)}

        def put(data: bytes | memoryview) -> str:
            names.append(name := self._artifacts.put(data))
            return name

        body = self._codecs.encode(dict(state), put, codec="torch", where="checkpoint")
        self._checkpoints.put(job=job_id, attempt=attempt, step=state["step"], body=body, blobs=names, run=kept)

    def drop(self, job_id: str) -> None:
        """Forget the checkpoints of a job that has published."""
        self._checkpoints.drop(job_id)


@final
class CheckpointWriter:
    """Writes the checkpoints of one run from a thread of its own; a context manager that ends the thread.

    Args:
        save: Stores a state.
        interval_s: Seconds between two checkpoints, at least.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        save: Callable[[Mapping[str, Any]], None],
        *,
        interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._save, self._interval_s, self._clock = save, interval_s, clock
        self._last = clock()
        self._waiting: Mapping[str, Any] | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._busy = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="mongotorch-scribe", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._waiting = None if error is not None else self._waiting
            self._changed.notify_all()
        self._thread.join()

    def is_due(self) -> bool:
        """Whether the interval has passed since the last checkpoint."""
        return self._clock() - self._last >= self._interval_s

    def write(self, state: Mapping[str, Any]) -> None:
        """Have a state written, in place of one that still waits. Raises: what an earlier write raised."""
        self._last = self._clock()
        with self._changed:
            self._raise()
            self._waiting = state
            self._changed.notify_all()

    def flush(self) -> None:
        """Return when nothing waits and nothing is being written. Raises: what a write raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or (self._waiting is None and not self._busy))
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting is not None)
                if self._waiting is None:
                    return
                state, self._waiting, self._busy = self._waiting, None, True
            try:
                self._save(state)
            except BaseException as error:  # noqa: BLE001 - it is raised again by the run
                with self._changed:
                    self._error = self._error or error
            with self._changed:
                self._busy = False
                self._changed.notify_all()
