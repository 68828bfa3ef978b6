"""The mirror `tensorboard:DIR`: event files, in a folder for each run, with a summary for each row.

What is there is read by TensorBoard's own reader. To it, a record that a killed process has half written is none,
and it is written again into another file. A lock keeps a second mirror out of the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Sequence
from datetime import UTC
from pathlib import Path
from typing import Any, ClassVar, Final, Self, final

from mongotorch.datalayer import Datalayer
from mongotorch.errors import SettingError, UnsupportedError
from mongotorch.jobs import MetricRow
from mongotorch.mirrors.base import Entry, MetricMirror, MirroredRun

try:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
except ImportError as error:
    raise UnsupportedError(
        "a mirror to tensorboard needs a package: pip install 'mongotorch[tensorboard]'"
    ) from error

_LOCK: Final = ".mongotorch.lock"
_COMPLETE: Final = ".mongotorch-complete.json"


@final
class TensorBoardMirror(MetricMirror):
    """Writes event files.

    Args:
        folder: The folder that `tensorboard --logdir` gets.
        lock: The descriptor of its lock, which is taken.
    """

    name: ClassVar[str] = "tensorboard"

    def __init__(self, folder: Path, lock: int) -> None:
        super().__init__()
        self._folder, self._lock = folder, lock
        self._writers: dict[str, Any] = {}

    @classmethod
    def open(cls, target: str, db: Datalayer) -> Self:  # noqa: ARG003
        """Make the folder, and take its lock. Raises: SettingError."""
        folder = Path(target)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise SettingError(f"tensorboard:{target} is no folder to write to: {error}", setting="to") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise SettingError(f"another mirror writes to tensorboard:{target}", setting="to") from error
        return cls(folder, lock)

    def close(self) -> None:
        """Close the files, and give the lock back."""
        for writer in self._writers.values():
            with contextlib.suppress(OSError):
                writer.close()
        self._writers = {}
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def written(self, run: MirroredRun) -> set[Entry]:
        """What TensorBoard's reader finds in the run's folder."""
        self._close(run)  # the next file begins behind what was half written
        folder = self._of(run)
        if not folder.exists():
            return set()
        reader = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
        reader.Reload()
        return {(tag, one.step) for tag in reader.Tags()["scalars"] for one in reader.Scalars(tag)}

    def write(self, run: MirroredRun, rows: Sequence[MetricRow]) -> None:
        """Append an event for each row, and flush the file."""
        if run.job not in self._writers:
            self._writers[run.job] = EventFileWriter(str(self._of(run)))
        writer = self._writers[run.job]
        for row in rows:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in row.values.items()]
            moment = row.time.replace(tzinfo=UTC).timestamp()
            writer.add_event(Event(wall_time=moment, step=row.step, summary=Summary(value=values)))
        writer.flush()

    def is_complete(self, run: MirroredRun) -> bool:
        """Whether the folder says so."""
        try:
            found = json.loads((self._of(run) / _COMPLETE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return bool(found == {"attempt": run.attempt})

    def complete(self, run: MirroredRun) -> None:
        """Close the file, and leave a note in the folder."""
        self._close(run)
        folder = self._of(run)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{_COMPLETE}.new").write_text(json.dumps({"attempt": run.attempt}), encoding="utf-8")
        (folder / f"{_COMPLETE}.new").replace(folder / _COMPLETE)

    def _close(self, run: MirroredRun) -> None:
        writer = self._writers.pop(run.job, None)
        if writer is not None:
            with contextlib.suppress(OSError):  # it has said so before
                writer.close()

    def _of(self, run: MirroredRun) -> Path:
        return self._folder / run.identifier / run.job
