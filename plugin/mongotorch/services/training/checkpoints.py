"""Checkpoints of a run: written by a thread of its own, read back by the attempt that resumes the run.

Guarantees: the run waits for the copy of its state and for nothing else. A checkpoint becomes visible when all of
it is stored. Of several that wait to be written only the newest is. An error of a write is raised in the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Final, Self, final

from mongotorch.codecs import Codecs, NamedBlob, NewBlobs
from mongotorch.errors import CodecError, JobCancelledError, JobReleasedError
from mongotorch.jobs import Lease
from mongotorch.mongo.driver_errors import redact
from mongotorch.store import OVER, BlobStore, Checkpoints
from mongotorch.train import Fit, Stepped, Validated

_log = logging.getLogger("mongotorch.jobs")
_NOTHING: Final = {"step": 0}  # the state of a checkpoint before the first step


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Resumed:
    """The newest checkpoint of a run.

    Attributes:
        state: What `Fit.capture` gave; None where no step was made yet.
        run: The record that holds for the whole run.
        blobs: The blobs that `run` names, by name.
        is_over: Whether the run has made its last step, and only has to be published.
    """

    state: Mapping[str, Any] | None
    run: Mapping[str, Any]
    blobs: Mapping[str, bytes]
    is_over: bool = False


@final
class RunCheckpoints:
    """Encodes and decodes the checkpoints of one database.

    Args:
        checkpoints: The checkpoint documents.
        blobs: The blobs.
        codecs: Encode and decode a state.
    """

    def __init__(self, checkpoints: Checkpoints, blobs: BlobStore, codecs: Codecs) -> None:
        self._checkpoints, self._blobs, self._codecs = checkpoints, blobs, codecs
        self._saved: set[str] = set()

    def load(self, job_id: str) -> Resumed | None:
        """The newest checkpoint of a job; None where there is none. Raises: TrustError, IntegrityError."""
        found = self._checkpoints.newest(job_id)
        if found is None:
            return None
        state: dict[str, Any] = self._codecs.decode(found["body"], self._blobs.get)
        run = found.get("run", {})
        return Resumed(
            state=None if state == _NOTHING else state,
            run=run.get("said", {}),  # the key in stored checkpoints
            blobs={name: self._blobs.get(name) for name in run.get("blobs", ())},
            is_over=bool(run.get(OVER)),
        )

    def run(self, job_id: str) -> dict[str, Any] | None:
        """The record of the whole run in a job's newest checkpoint; None where there is no checkpoint."""
        found = self._checkpoints.newest(job_id)
        return None if found is None else found.get("run", {}).get("said", {})

    def save(
        self,
        job: Mapping[str, Any],
        state: Mapping[str, Any] | None,
        *,
        run: Mapping[str, Any],
        blobs: Mapping[str, bytes | NamedBlob],
        over: bool = False,
    ) -> bool:
        """Store a checkpoint: first its blobs, then the document that makes it visible.

        Args:
            job: The claimed job document.
            state: What `Fit.capture` gave; None before the first step, where the record is to be kept.
            run: The record that holds for the whole run; plain BSON.
            blobs: The blobs that `run` names, by name.
            over: The run has made its last step, and only its publication is missing.

        Returns:
            False: the job no longer runs under this attempt, and there is no checkpoint.
        """
        record: dict[str, Any] = {"said": dict(run), "blobs": self._blobs.put_all(blobs.values())}
        if over:
            record[OVER] = True
        state = _NOTHING if state is None else state
        self._saved.add(job["_id"])
        body, new = self._encoded(dict(state))
        names = [*record["blobs"], *self._blobs.put_all(new.blobs.values())]
        return self._checkpoints.put(
            job=job["_id"], attempt=job["attempt"], step=state["step"], body=body, blobs=names, run=record
        )

    def _encoded(self, state: dict[str, Any]) -> tuple[Any, NewBlobs]:
        """The record of a state and its blobs; what is kept besides is left out where it cannot be stored."""
        new = NewBlobs()
        try:
            return self._codecs.encode(state, new, codec="torch", where="checkpoint"), new
        except CodecError as error:
            if not state.get("kept"):
                raise
            names = ", ".join(state["kept"])
            _log.warning("a checkpoint is stored without the states of %s: %s", names, error)
            return self._encoded({**state, "kept": {}})

    def drop(self, job: Mapping[str, Any]) -> None:
        """Drop the checkpoints of a claimed job; the first attempt has none but those that it saved itself."""
        if job["attempt"] > 1 or job["_id"] in self._saved:
            self._checkpoints.drop(job["_id"])
        self._saved.discard(job["_id"])


@final
class CheckpointWriter:
    """Observes a run and writes its checkpoints: after validations, when the interval is over, and before a stop.

    Args:
        save: Stores a state.
        interval_s: Write a checkpoint when so many seconds have passed since the last one.
        lease: The attempt's hold on its job; None never stops.
        more: What is kept besides the state of the run, when that is captured.
        clock: A monotonic clock, in seconds.
    """

    def __init__(
        self,
        save: Callable[[Mapping[str, Any]], None],
        *,
        interval_s: float,
        lease: Lease | None = None,
        more: Callable[[], Mapping[str, Any]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._save, self._interval_s, self._lease, self._clock = save, interval_s, lease, clock
        self._more = more
        self._last = clock()
        self._fit: Fit | None = None
        self._waiting: Mapping[str, Any] | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._busy = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="mongotorch-checkpoints", daemon=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._waiting = None if error is not None else self._waiting
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def on_start(self, fit: Fit) -> None:
        """Take the run whose state is written."""
        self._fit = fit

    def on_step(self, event: Stepped) -> None:
        """Write a checkpoint if one is due. Raises: JobReleasedError if the process has to stop."""
        is_due = self._clock() - self._last >= self._interval_s
        if is_due or (self._lease is not None and self._lease.is_stopping):
            self._after(event, is_due=is_due)

    def on_validation(self, event: Validated) -> None:
        """Write a checkpoint. Raises: JobReleasedError if the process has to stop."""
        self._after(event, is_due=True)

    def on_end(self) -> None:
        """Write nothing: the result of the run is published."""

    def write(self, state: Mapping[str, Any]) -> None:
        """Have a state written, in place of one that still waits. Raises: what an earlier write raised."""
        self._last = self._clock()
        if self._thread.ident is None:  # a run that writes none needs no thread
            self._thread.start()
        with self._changed:
            self._raise()
            self._waiting = state
            self._changed.notify_all()

    def flush(self) -> None:
        """Return when nothing waits and nothing is being written. Raises: what a write raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or (self._waiting is None and not self._busy))
            self._raise()

    def _after(self, event: Stepped | Validated, *, is_due: bool) -> None:
        if self._fit is None:
            return
        if self._lease is not None and self._lease.is_stopping:
            self.write(self._captured(self._fit))
            self.flush()
            raise JobReleasedError(f"the job is handed back after step {event.step}")
        if is_due and not self._fit.is_over:
            self.write(self._captured(self._fit))

    def _captured(self, fit: Fit) -> dict[str, Any]:
        return {**fit.capture(), **self._more()}

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
            except BaseException as error:  # noqa: BLE001 - raised in the run by the next `write` or `flush`
                with self._changed:
                    self._error = self._error or error
            with self._changed:
                self._busy = False
                self._changed.notify_all()


@contextlib.contextmanager
def kept_where_failing(keep: Callable[[], None]) -> Iterator[None]:
    """Keep what was trained, as a checkpoint, where something inside raises."""
    try:
        yield
    except JobCancelledError:
        raise
    except Exception:
        try:
            keep()
        except Exception as error:  # noqa: BLE001 - the first error says why nothing was published
            _log.warning("what was trained could not be kept as a checkpoint: %s", redact(str(error)))
        raise
