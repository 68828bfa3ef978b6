"""Adds up tensors of ranks that run on one machine, through memory that all of them see.

Over a socket each tensor is copied into the kernel and out of it on both sides, which on a machine whose cores all
compute costs about a fifth of a step. Here each rank copies its part into memory of its own that the others have
mapped as well, all wait for each other, and each adds up what it sees: two ranks all of it, more ranks a share, of
which the others copy the sum.

A rank has two buffers in turn: who writes one again knows that all have added up what was in it before, since they
have met once more meanwhile. The memory has no name in any folder, so that nothing is left over however ranks end.

Guarantees: a sum is the binary tree over the ranks that `Group.sum` promises, so it has the same bits as one over
sockets. All ranks use the memory, or none does.
"""

from __future__ import annotations

import mmap
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

BUFFER_BYTES: Final = 2**23
"""Of a buffer; larger tensors are added up in parts. Memory is used as far as it was written to."""
_TOKEN_BYTES: Final = 64  # at the start of what a rank shares, so that what comes behind is aligned
_AT_ONCE: Final = 2**15  # numbers that are added up at a time, where there are more than two ranks


@final
class SharedMemory:
    """The buffers of all ranks, in one of them.

    Args:
        mapped: What each rank shares, in the order of the ranks.
        rank: Which of them this is.
        meet: Returns when all ranks have called it.
        add_up: The sum of some tensors, one of each rank, in their order.
    """

    def __init__(
        self,
        mapped: Sequence[mmap.mmap],
        *,
        rank: int,
        meet: Callable[[], None],
        add_up: Callable[[Sequence[Tensor]], Tensor],
    ) -> None:
        whole = [torch.frombuffer(one, dtype=torch.uint8)[_TOKEN_BYTES:] for one in mapped]
        self._buffers = [one.view(2, BUFFER_BYTES) for one in whole]
        self._rank, self._meet, self._add_up, self._turn = rank, meet, add_up, 0

    @classmethod
    def of(
        cls,
        rank: int,
        *,
        gather: Callable[[Any], list[Any]],
        meet: Callable[[], None],
        add_up: Callable[[Sequence[Tensor]], Tensor],
    ) -> SharedMemory | None:
        """The memory of all ranks, each of which calls this; None where they cannot share any.

        Args:
            rank: Which of them this is.
            gather: Gives what all ranks have given, in their order.
            meet: As in `SharedMemory`.
            add_up: As in `SharedMemory`.
        """
        size, token, file = _TOKEN_BYTES + 2 * BUFFER_BYTES, secrets.token_bytes(_TOKEN_BYTES), -1
        try:
            try:
                file = _made(size, token)
                offer: Any = (_machine(), os.getpid(), file, token)
            except OSError:  # another system, or memory that cannot be had
                offer = None
            offers = gather(offer)
            mapped: list[mmap.mmap] | None = None
            if None not in offers and len({machine for machine, *_ in offers}) == 1:
                mapped = _mapped([found for _, *found in offers], size)
            if not all(gather(mapped is not None)) or mapped is None:
                return None
            return cls(mapped, rank=rank, meet=meet, add_up=add_up)
        finally:
            if file >= 0:
                os.close(file)

    def sum(self, parts: Sequence[Tensor]) -> None:
        """Put the sum over all ranks in the place of tensors of shape (n,) and one dtype, on the CPU.

        Raises:
            RuntimeError: What `meet` raises where a rank is gone.
        """
        for together in _fitting(parts, BUFFER_BYTES // parts[0].element_size()):
            sizes = list(map(len, together))
            size, dtype = sum(sizes) * together[0].element_size(), together[0].dtype
            buffers = [one[self._turn, :size].view(dtype) for one in self._buffers]
            self._turn = 1 - self._turn
            _copy(torch.split(buffers[self._rank], sizes), together)
            self._meet()
            if len(buffers) > 2:
                self._add_shares(buffers, together)
                continue
            for into, *found in zip(together, *(torch.split(one, sizes) for one in buffers), strict=True):
                torch.add(*found, out=into)  # a sum of two has no order

    def _add_shares(self, buffers: list[Tensor], into: list[Tensor]) -> None:
        """Add up a share of the numbers on each rank, in the place of what only this rank reads of its own."""
        each = -(-len(buffers[0]) // len(buffers))
        shares = [torch.split(one, each) for one in buffers]
        if self._rank < len(shares[0]):
            cut = [torch.split(one[self._rank], _AT_ONCE) for one in shares]
            for mine, *found in zip(cut[self._rank], *cut, strict=True):
                mine.copy_(self._add_up(found))
        self._meet()
        start = 0
        for one in into:
            for rank in range(start // each, -(-(start + len(one)) // each)):
                first, stop = max(rank * each, start), min((rank + 1) * each, start + len(one))
                one[first - start : stop - start].copy_(buffers[rank][first:stop])
            start += len(one)


def _fitting(parts: Sequence[Tensor], most: int) -> Iterator[list[Tensor]]:
    """The same numbers in the same order, so many at a time at most."""
    together: list[Tensor] = []
    room = most
    for part in parts:
        at = 0
        while at < len(part):
            together.append(part[at : at + room])
            at, room = at + len(together[-1]), room - len(together[-1])
            if not room:
                yield together
                together, room = [], most
    if together:
        yield together


def _copy(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    torch._foreach_copy_(list(into), list(values))


def _machine() -> tuple[str, str]:
    """What two processes have alike that see each other under `/proc`. Raises: OSError."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    return boot, str(Path("/proc/self/ns/pid").readlink())


def _made(size: int, token: bytes) -> int:
    """A file that is memory, and has no name. Raises: OSError."""
    if not hasattr(os, "memfd_create"):
        raise OSError("there is no memfd_create")
    file = os.memfd_create("mongotorch-ranks")
    os.ftruncate(file, size)
    os.pwrite(file, token, 0)
    return file


def _mapped(offers: list[list[Any]], size: int) -> list[mmap.mmap] | None:
    """What each of these processes shares; None where one of them cannot be seen from here."""
    found: list[mmap.mmap] = []
    try:
        for process, number, token in offers:
            # What another process has under this number, in case that it is not seen alike, is not waited for.
            file = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                found_file = os.fstat(file)
                if not stat.S_ISREG(found_file.st_mode) or found_file.st_size != size:
                    return None
                found.append(mmap.mmap(file, size))
            finally:
                os.close(file)
            if found[-1][: len(token)] != token:
                return None
    except OSError:
        return None
    return found
