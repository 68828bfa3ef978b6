"""Where a stream is, as a few numbers and a row marker that rows which come or go cannot shift.

A row marker is a short text (under 600 characters) that says which row of a window was yielded last, not how many
lie before it. In a shuffled window rows lie in the order of their hashes, else in the order of their `_id`s, so
the first row behind a marker is found even where the marked row itself is gone.

A `DataLoader` copies a stream to its workers, anew for each of its epochs or once for all of them, and tells
them no epoch. The first copy that begins to read takes the next epoch and writes it down (`LoaderEpochs`), and the
copies beside it take the same. They do so in a small file under a lock: shared memory would need a lock of
processes, which a worker that is killed never gives back.

Guarantees: all workers of one loader read the same epoch; each later iteration of a loader has a later epoch; no
file is there before a worker has begun to read; the lock ends with the process that holds it.
"""

from __future__ import annotations

import abc
import bisect
import contextlib
import fcntl
import json
import os
import tempfile
import uuid
import weakref
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar, final

import bson
import numpy as np

from mongotorch.data.decode import U64, Column, sort_key

T = TypeVar("T")
_Entry = dict[str, Any]  # of an iteration: its number, its first and its latest epoch, and its workers' processes
_KEPT = 16  # iterations of loaders that are remembered: those that run at the same time
_LONGEST = 256  # bytes of an `_id` that a state may hold


class RowMarkers(abc.ABC):
    """The markers of the rows of one window, in their order."""

    @abc.abstractmethod
    def before(self, row: int) -> str | None:
        """The marker of the row before this one; None where there is none."""

    @abc.abstractmethod
    def behind(self, marker: str) -> int | None:
        """The first row that was not yielded when this marker was made; None for a marker of another kind."""


@final
class HashMarkers(RowMarkers):
    """Markers of rows in the ascending order of their hashes.

    Args:
        hashes: uint64 of shape (rows,), ascending.
    """

    def __init__(self, hashes: U64) -> None:
        self._hashes = hashes

    def before(self, row: int) -> str | None:
        """See `RowMarkers.before`: the hash, and how many rows of that very hash lie before."""
        if row < 1:
            return None
        value = self._hashes[row - 1]
        return f"{int(value):016x}:{row - int(np.searchsorted(self._hashes, value))}"

    def behind(self, marker: str) -> int | None:
        """See `RowMarkers.behind`."""
        digits, colon, equal = marker.partition(":")
        if not colon:
            return None
        value = np.uint64(int(digits, 16))
        first, last = (int(np.searchsorted(self._hashes, value, side)) for side in ("left", "right"))
        return min(first + int(equal), last)


@final
class IdMarkers(RowMarkers):
    """Markers of rows in the ascending order of their `_id`s.

    Args:
        ids: The `_id`s; one may come several times.
    """

    def __init__(self, ids: Column) -> None:
        self._ids = ids

    def before(self, row: int) -> str | None:
        """See `RowMarkers.before`: the `_id` as BSON; None also for one that is too long for a state.

        Where its document comes again behind it, also how many times it came.
        """
        encoded = bson.encode({"": self._ids[row - 1]}) if row > 0 else b""
        if not 0 < len(encoded) <= _LONGEST:
            return None
        first = next((at for at in range(row - 1, 0, -1) if not self._is(at - 1, encoded)), 0)
        comes_again = row < len(self._ids) and self._is(row, encoded)
        return f"{encoded.hex()}.{row - first}" if comes_again else encoded.hex()

    def _is(self, row: int, encoded: bytes) -> bool:
        return bson.encode({"": self._ids[row]}) == encoded

    def behind(self, marker: str) -> int | None:
        """See `RowMarkers.behind`."""
        if ":" in marker:
            return None
        digits, is_repeated, times = marker.partition(".")
        last: Any = sort_key(bson.decode(bytes.fromhex(digits))[""])
        behind = bisect.bisect_right(self._ids.values(), last, key=sort_key)
        if not is_repeated:
            return behind
        return min(bisect.bisect_left(self._ids.values(), last, key=sort_key) + int(times), behind)


@final
@dataclass(frozen=True, kw_only=True)
class Position:
    """A position between two rows of an epoch.

    Attributes:
        epoch: The epoch.
        window: The window.
        offset: Rows of the window that lie before.
        step: Batches (of all shards together: rounds) that lie before.
        skipped: Documents of the epoch that were left out before, in earlier windows or by a `transform`.
        after: The marker of the last row before; it counts where it is there, `offset` where it is not.
        markers: Those of the window, to make `after` of.
    """

    epoch: int = 0
    window: int = 0
    offset: int = 0
    step: int = 0
    skipped: int = 0
    after: str | None = None
    markers: RowMarkers | None = field(default=None, repr=False, compare=False)

    def state(self) -> dict[str, Any]:
        """The position as numbers and a text; the marker is made here, because few positions are ever kept."""
        after = self.after if self.markers is None else self.markers.before(self.offset)
        numbers = {name: getattr(self, name) for name in ("epoch", "window", "offset", "step")}
        return {**numbers, "after": after, **({"skipped": self.skipped} if self.skipped else {})}

    def digest(self, rows: int) -> int:
        """A number below 4096 that tells this position behind so many rows from others."""
        return zlib.crc32(json.dumps([*self.state().values(), rows]).encode()) % 4096

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The position that `state` gave; what else is in the state is left out."""
        numbers = {name: state[name] for name in ("epoch", "window", "offset", "step", "after")}
        return cls(**numbers, skipped=state.get("skipped", 0))

    def row(self, markers: RowMarkers | None) -> int:
        """The first row behind the position in what is now in its window, which has these markers."""
        found = None if markers is None or self.after is None else markers.behind(self.after)
        return self.offset if found is None else found


@final
@dataclass(frozen=True, kw_only=True)
class Turn:
    """Which batches a worker of a user's loader yields: those in its turn.

    Attributes:
        worker: The number of the worker.
        workers: How many there are.
        number: The number of the first batch, counted over all workers, that may be this worker's next.
    """

    worker: int
    workers: int
    number: int = 0

    @property
    def own(self) -> int:
        """The number of the next batch of this worker."""
        return self.number + (self.worker - self.number) % self.workers

    def __contains__(self, number: int) -> bool:
        return number % self.workers == self.worker


@final
class LoaderEpochs:
    """What the copies of one stream have written down.

    Copies have the same file, and each knows up to which move of the stream (`moved`) it has followed.
    """

    def __init__(self) -> None:
        self._path = Path(tempfile.gettempdir()) / f"mongotorch-stream-{uuid.uuid4().hex}.json"
        self._moves = 0
        self._home = os.getpid()
        weakref.finalize(self, _remove, self._path, self._home)

    def close(self) -> None:
        """Remove the file, in the process that made this."""
        _remove(self._path, self._home)

    def begin(
        self, loader: int, turn: Turn, epoch: int, *, again: bool = False, own: bool = False
    ) -> tuple[int, Mapping[str, Any] | None]:
        """Which epoch the copy in a worker reads now.

        Args:
            loader: A number that the workers of one iteration of a loader share, torch's base seed; another
                iteration may happen to have the same.
            turn: Of the worker.
            epoch: The epoch that the copy would read alone.
            again: It has read an epoch before, and counts from there.
            own: The epoch is that of a state which was loaded in the worker, and stays.

        Returns:
            The epoch, and the state to load first where the stream was moved since.
        """

        def join(content: dict[str, Any]) -> tuple[int, Mapping[str, Any] | None]:
            moved, self._moves = content["moves"] != self._moves and not own, content["moves"]
            state = content["state"] if moved else None
            found = state["epoch"] if state else epoch
            entries: list[_Entry] = content["loaders"]
            entry = next((one for one in entries if one["pids"].get(str(turn.worker)) == os.getpid()), None)
            if entry is None:
                entry = _sibling(entries, loader, turn.worker, epoch if own else None)
            if not own and not (again and not moved):
                if entry is not None:
                    found = entry["first"]
                elif entries:
                    found = max(found, *(one["latest"] + 1 for one in entries))
            if entry is None:
                entries.append(entry := {"loader": loader, "first": found, "latest": found, "pids": {}})
                del entries[:-_KEPT]
            entry["pids"][str(turn.worker)] = os.getpid()
            entry["latest"] = max(entry["latest"], found)
            return found, state

        return self._change(join, create=True)  # type: ignore[return-value]

    def latest(self) -> int | None:
        """The latest epoch that workers have begun since the stream was moved; None where they have not."""

        def newest(content: dict[str, Any]) -> int | None:
            return max((entry["latest"] for entry in content["loaders"]), default=None)

        return self._change(newest, create=False)

    def moved(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration of each worker begin at this state, which the stream was moved to."""

        def move(content: dict[str, Any]) -> None:
            content.update(moves=content["moves"] + 1, state=dict(state), loaders=[])
            self._moves = content["moves"]

        self._change(move, create=False)

    def _change(self, change: Callable[[dict[str, Any]], T], *, create: bool) -> T | None:
        """What a function makes of the content, which it may change; None where there is no file."""
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        try:
            file = os.fdopen(os.open(self._path, flags, 0o600), "r+")
        except FileNotFoundError:
            return None
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            before = file.read()
            content = json.loads(before) if before else {"moves": self._moves, "state": None, "loaders": []}
            result = change(content)
            after = json.dumps(content)
            if after != before:
                # Longer than what was there, or padded: it is whole at once, whenever the process is killed.
                os.pwrite(file.fileno(), after.ljust(len(before)).encode(), 0)
        return result


def _sibling(entries: list[_Entry], loader: int, worker: int, epoch: int | None) -> _Entry | None:
    """The newest iteration that a worker belongs to: of its number, running, and without such a worker yet."""
    for entry in reversed(entries):
        same = entry["loader"] == loader and epoch in (None, entry["first"])
        if same and str(worker) not in entry["pids"] and any(map(_runs, entry["pids"].values())):
            return entry
    return None


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path, home: int) -> None:
    if os.getpid() == home:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
