"""Lets the ranks of one run add up tensors and agree on values: the protocol `Group`, and two groups.

`Alone` is a run of one rank. `ProcessGroup` are the processes of `torch.distributed`, whoever has started them.

Guarantees: a sum has the same bits on every rank. With `exact` it is one binary tree over the ranks, so that a
rank which adds up its own part as a binary tree gives the same bits on any number of ranks that is a power of two.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import pickle
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Final, Literal, Protocol, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor

from mongotorch.errors import ParameterError, TrainingError, WorkerLostError
from mongotorch.train.parallel.shared_memory import SharedMemory

T = TypeVar("T")
LEAST_SHARED_BYTES: Final = 2**20
"""Of tensors that ranks of one machine add up in shared memory; below, a message costs no more than waiting."""
Reduce = Literal["exact", "fast"]
"""How gradients are added up: as one binary tree over the lanes, or by one `all_reduce`."""


class Group(Protocol):
    """The ranks that train one model together; all of them call each method, in the same order.

    Attributes:
        rank: Which of them this is, from 0.
        world: How many there are.
    """

    rank: int
    world: int

    def sum(self, parts: Sequence[Tensor]) -> None:
        """Put the sum over all ranks in the place of these tensors of shape (n,), alike on all of them.

        Raises:
            WorkerLostError: Another rank is gone, or did not answer in time.
        """

    def share(self, value: T) -> T:
        """The value that rank 0 gives, on every rank. Raises: WorkerLostError."""

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in the order of the ranks, on every rank. Raises: WorkerLostError."""

    def close(self) -> None:
        """Leave the group; whoever waits for this rank then gets an error."""


@final
class Alone:
    """A group of one rank."""

    rank = 0
    world = 1

    def sum(self, parts: Sequence[Tensor]) -> None:
        """See `Group.sum`: they are the sum."""

    def share(self, value: T) -> T:
        """See `Group.share`: the value itself."""
        return value

    def gather(self, value: T) -> list[T]:
        """See `Group.gather`."""
        return [value]

    def close(self) -> None:
        """There is nothing to leave."""


ALONE: Final = Alone()
"""The group of a process that works without others."""


@final
class ProcessGroup:
    """The ranks of the default process group of `torch.distributed`: gloo on a CPU, nccl on CUDA.

    Args:
        reduce: How to add up: `exact`, by recursive doubling, or in memory that the ranks of one machine share,
            which gives the same bits on 1, 2, 4 or 8 ranks; or `fast`, by one `all_reduce`.
        timeout_s: How long the sum of a pair may take, where there are more than two ranks.

    Raises:
        ParameterError: `init_process_group` was not called, or there is no such way to add up.
    """

    def __init__(self, reduce: Reduce = "exact", timeout_s: float = 600.0) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ParameterError(
                "there is no process group; call torch.distributed.init_process_group() first", field="group"
            )
        if reduce not in ("exact", "fast"):
            raise ParameterError(f"reduce={reduce!r}: it must be 'exact' or 'fast'", field="reduce")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._reduce = reduce
        self._timeout = timedelta(seconds=timeout_s)
        self._shared: SharedMemory | None = None
        self._flat: Tensor | None = None  # memory that is had anew each time has to be cleared each time
        self._has_looked = False  # whether the ranks can share memory

    @functools.cached_property
    def _pairs(self) -> list[dist.ProcessGroup | None]:
        """The pairs in which this rank adds up, twice as far apart each time; a sum of two has no order."""
        if self.world <= 2:
            return [None] * (self.world - 1)
        pairs: list[dist.ProcessGroup | None] = []
        distances = (1 << n for n in range(self.world.bit_length() - 1))
        for distance, low in itertools.product(distances, range(self.world)):
            if not low & distance:
                made = dist.new_group([low, low | distance], timeout=self._timeout)
                if self.rank in (low, low | distance):
                    pairs.append(made)
        return pairs

    def sum(self, parts: Sequence[Tensor]) -> None:
        """See `Group.sum`."""
        with self._waiting():
            if (shared := self._shared_for(parts)) is not None:
                shared.sum(parts)
                return
            found = self._summed(self._laid_out(parts))
            for part, one in zip(parts, torch.split(found, list(map(len, parts))), strict=True):
                part.copy_(one)

    def _laid_out(self, parts: Sequence[Tensor]) -> Tensor:
        """All of them in one tensor, which is used again."""
        size, like = sum(map(len, parts)), parts[0]
        flat = self._flat
        if flat is None or (len(flat), flat.dtype, flat.device) != (size, like.dtype, like.device):
            flat = self._flat = torch.empty(size, dtype=like.dtype, device=like.device)
        return torch.cat(list(parts), out=flat)

    def _summed(self, flat: Tensor) -> Tensor:
        """The sum over all ranks, by messages."""
        if self._reduce == "fast":
            dist.all_reduce(flat)
            return flat
        if self.world & (self.world - 1):
            given = [torch.empty_like(flat) for _ in range(self.world)]
            dist.all_gather(given, flat)
            return tree_sum(given.__getitem__, 0, self.world)
        for pair in self._pairs:
            dist.all_reduce(flat, group=pair)
        return flat

    def _shared_for(self, parts: Sequence[Tensor]) -> SharedMemory | None:
        """The memory to add tensors up in; None where the ranks have none, or do better without."""
        is_large = sum(part.nbytes for part in parts) >= LEAST_SHARED_BYTES
        if self._reduce == "fast" or self.world == 1 or parts[0].device.type != "cpu" or not is_large:
            return None
        if not self._has_looked:
            self._has_looked = True
            met = torch.zeros(1)
            self._shared = SharedMemory.of(
                self.rank,
                gather=self.gather,
                meet=lambda: dist.all_reduce(met) and None,
                add_up=lambda parts: tree_sum(parts.__getitem__, 0, len(parts)),
            )
        return self._shared

    def share(self, value: T) -> T:
        """See `Group.share`."""
        shared = [value]
        with self._waiting():
            dist.broadcast_object_list(shared, src=0)
        return shared[0]

    def gather(self, value: T) -> list[T]:
        """See `Group.gather`."""
        found: list[Any] = [None] * self.world
        with self._waiting():
            dist.all_gather_object(found, value)
        return found

    def close(self) -> None:
        """See `Group.close`: destroys the default process group."""
        self._shared = self._flat = None
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what torch raises for a closed connection as well as for a timeout
            raise WorkerLostError(
                f"rank {self.rank} of {self.world} lost another worker, or waited too long for it: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error


def raise_first(group: Group, error: Exception | None, errors: Sequence[Exception | None] | None = None) -> None:
    """Let all ranks raise where one has an error: each its own, else that of the first rank that has one.

    Args:
        group: The ranks.
        error: That of this rank, if it has one.
        errors: Those of all ranks, made `portable`; None asks for them.

    Raises:
        Exception: The error.
    """
    if errors is None:
        errors = [error] if group.world == 1 else group.gather(portable(error))
    if error is not None:
        raise error
    for rank, one in enumerate(errors):
        if one is not None:
            one.add_note(f"on rank {rank} of {group.world}")
            raise one


def portable(error: Exception | None) -> Exception | None:
    """An error, or where another process could not read it one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - what was just written
    except Exception:  # noqa: BLE001 - whatever pickle says to a class of the user
        return TrainingError(f"{type(error).__name__}: {error}")
    return error


@contextlib.contextmanager
def first_rank(group: Group) -> Iterator[bool]:
    """Whether this is rank 0, which does what is inside for all; what it raises there is raised on all."""
    error: Exception | None = None
    try:
        yield group.rank == 0
    except Exception as raised:
        if group.world == 1:
            raise
        error = raised
    if group.world > 1:
        raise_first(group, error)


def tree_sum(part: Callable[[int], T], first: int, stop: int, add: Callable[[T, T], T] | None = None) -> T:
    """The sum of parts `first` to `stop` as one binary tree, each part made when its turn comes.

    No more of them are there at a time than the tree is high.

    Args:
        part: Gives a part by its number.
        first: The first number.
        stop: The number behind the last.
        add: Adds two sums up; None is `+`.
    """
    if stop - first == 1:
        return part(first)
    middle = (first + stop + 1) // 2
    left = tree_sum(part, first, middle, add)
    right = tree_sum(part, middle, stop, add)
    total: Any = left + right if add is None else add(left, right)  # type: ignore[operator]
    return total  # type: ignore[no-any-return]
