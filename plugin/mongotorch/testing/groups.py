"""Lets threads of one process train one model together: the in-memory twin of a process group, for tests.

Guarantees: sums have the bits of `ProcessGroup(reduce="exact")`. A thread that fails or leaves ends the waiting of
the others at once.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from mongotorch.errors import WorkerLostError
from mongotorch.train.parallel.group import Group, tree_sum

T = TypeVar("T")


@final
class _Room:
    """Where the threads of one group exchange values."""

    def __init__(self, world: int, timeout_s: float) -> None:
        self.world = world
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._rounds: list[dict[int, Any]] = []
        self._is_closed = False

    def exchange(self, rank: int, number: int, value: Any) -> list[Any]:
        """The values of all threads in one round, which nobody changes. Raises: WorkerLostError."""
        with self._changed:
            while len(self._rounds) <= number:
                self._rounds.append({})
            values = self._rounds[number]
            values[rank] = value
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(values) == self.world or self._is_closed, self._timeout_s)
            if len(values) < self.world:
                raise WorkerLostError(f"rank {rank} of {self.world} lost another worker")
            self._rounds[max(number - 1, 0)] = {} if number else values  # all have left that one
            return [values[one] for one in range(self.world)]

    def close(self) -> None:
        """End the waiting of all."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


@final
class ThreadGroup:
    """One rank of a group of threads, see `Group`; made by `thread_groups`."""

    def __init__(self, room: _Room, rank: int) -> None:
        self._room, self.rank, self.world = room, rank, room.world
        self._number = 0

    def _exchange(self, value: Any) -> list[Any]:
        self._number += 1
        return self._room.exchange(self.rank, self._number - 1, value)

    def sum(self, parts: Sequence[Tensor]) -> None:
        """See `Group.sum`."""
        given: list[Tensor] = self._exchange(torch.cat([part.clone() for part in parts]))
        total: Tensor = tree_sum(given.__getitem__, 0, self.world)
        for part, found in zip(parts, torch.split(total, list(map(len, parts))), strict=True):
            part.copy_(found)

    def share(self, value: T) -> T:
        """See `Group.share`."""
        shared: T = copy.deepcopy(self._exchange(value)[0])
        return shared

    def gather(self, value: T) -> list[T]:
        """See `Group.gather`."""
        return copy.deepcopy(self._exchange(value))

    def close(self) -> None:
        """See `Group.close`."""
        self._room.close()


def thread_groups(world: int, timeout_s: float = 60.0) -> list[ThreadGroup]:
    """The ranks of a group of threads, one for each.

    Args:
        world: How many.
        timeout_s: How long one waits for the others.
    """
    room = _Room(world, timeout_s)
    return [ThreadGroup(room, rank) for rank in range(world)]


def run_ranks(world: int, rank_main: Callable[[Group], T], timeout_s: float = 60.0) -> list[T | Exception]:
    """Call a function in one thread a rank.

    Args:
        world: How many ranks.
        rank_main: What each rank does with its group; it is closed where that raises.
        timeout_s: How long one rank waits for the others.

    Returns:
        What it gave on each rank, or what it raised there.
    """
    groups = thread_groups(world, timeout_s)
    results: list[T | Exception] = [WorkerLostError("it did not end")] * world

    def run(group: ThreadGroup) -> None:
        try:
            results[group.rank] = rank_main(group)
        except Exception as error:  # noqa: BLE001 - it is what the caller gets
            results[group.rank] = error
            group.close()

    threads = [threading.Thread(target=run, args=(group,), daemon=True) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
