"""Ranks of one machine add up in memory that they share, with the bits of any other way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.helpers import seeded
from tests.train.test_group import fitting, mlp, trainer

from mongotorch.errors import WorkerLostError
from mongotorch.train import ProcessGroup, Stepped
from mongotorch.train.parallel import group as groups
from mongotorch.train.parallel import shared_memory
from mongotorch.train.parallel.group import tree_sum

SIZES = [1, 7, 1024, 1025, 5000, 40_001]  # numbers, in buffers of 4096 bytes


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "LEAST_SHARED_BYTES", 1)
    monkeypatch.setattr(shared_memory, "BUFFER_BYTES", 4096)


def run(*given: Any) -> None:
    """Call a function as `by_ranks` does, to the end; what one of them raises is raised."""
    context = by_ranks(*given)
    while not context.join():
        pass


def by_ranks(world: int, folder: Path, function: Callable[..., None], *given: Any) -> Any:
    """Call a function with the group in each of several processes, forked from this one."""
    start: Any = torch.multiprocessing.start_processes  # type: ignore[attr-defined]
    return start(joined, (world, str(folder), function, given), nprocs=world, join=False, start_method="fork")


def joined(rank: int, world: int, folder: str, function: Callable[..., None], given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/meet", timeout, rank=rank, world_size=world)
    group = ProcessGroup()
    function(group, *given)
    group.share(None)
    group.close()


def part(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of any size and sign, whose sum depends on the order; of some the sum is not finite."""
    draw = torch.Generator().manual_seed(1000 * rank + size)
    found = torch.randn(size, generator=draw, dtype=dtype) * 10.0 ** torch.randint(
        -30, 30, (size,), generator=draw
    )
    found[size // 2] = [0.0, -0.0, float("inf"), float("inf")][rank % 4]
    return found.to(dtype)


def sums(group: ProcessGroup, world: int) -> None:
    for dtype in (torch.float32, torch.float64):
        for size in SIZES:
            expected = tree_sum(lambda rank, size=size, dtype=dtype: part(rank, size, dtype), 0, world)  # type: ignore[misc]
            found = part(group.rank, size, dtype)
            group.sum([found])
            assert found.numpy().tobytes() == expected.numpy().tobytes(), (dtype, size)
            cut = part(group.rank, size, dtype)
            group.sum(torch.split(cut, [size // 3, 0, size - size // 3]))
            assert cut.numpy().tobytes() == expected.numpy().tobytes(), (dtype, size)
    assert group._shared is not None


@pytest.mark.parametrize("world", [2, 3, 4])
def test_sums_have_the_bits_of_the_tree(tmp_path: Path, world: int) -> None:
    run(world, tmp_path, sums, world)


def by_sockets(group: ProcessGroup, world: int, patched: str) -> None:
    if (
        group.rank == world - 1
    ):  # such a rank cannot make memory, or is on another machine, or not seen by the others
        setattr(shared_memory, patched, {"_made": refused, "_machine": elsewhere, "_mapped": unseen}[patched])
    for size in SIZES:
        expected = tree_sum(lambda rank, size=size: part(rank, size, torch.float32), 0, world)  # type: ignore[misc]
        found = part(group.rank, size, torch.float32)
        group.sum([found])
        assert found.numpy().tobytes() == expected.numpy().tobytes()
    assert group._shared is None
    assert not [one for one in Path("/proc/self/fd").iterdir() if "mongotorch-ranks" in os.path.realpath(one)]


def refused(size: int, token: bytes) -> int:
    raise OSError(f"no {size} bytes for {token!r}")


def elsewhere() -> tuple[str, str]:
    return "another", "machine"


def unseen(offers: Any, size: int) -> None:
    assert offers
    assert size


@pytest.mark.parametrize("patched", ["_made", "_machine", "_mapped"])
def test_where_one_rank_cannot_share_all_use_sockets(tmp_path: Path, patched: str) -> None:
    run(2, tmp_path, by_sockets, 2, patched)


def killed(group: ProcessGroup, folder: str) -> None:
    group.sum([torch.ones(5000)])
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(WorkerLostError, match="rank 0 of 2 lost another worker"):
        group.sum([torch.ones(5000)])
    Path(folder, "heard").touch()
    os._exit(0)


def test_a_rank_that_is_killed_is_noticed(tmp_path: Path) -> None:
    context = by_ranks(2, tmp_path, killed, str(tmp_path))
    context.processes[0].join(120)
    assert (tmp_path / "heard").exists()
    context.processes[1].join(60)


def test_what_is_not_shared_memory_is_not_mapped(tmp_path: Path) -> None:
    size, token = shared_memory._TOKEN_BYTES + 2 * 4096, b"t" * shared_memory._TOKEN_BYTES
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    other = shared_memory._made(size, b"o" * len(token))
    opened = [os.open(fifo, os.O_RDWR | os.O_NONBLOCK), shared_memory._made(size + 1, token), other]
    try:
        for number in (*opened, 10**6):
            assert shared_memory._mapped([[os.getpid(), number, token]], size) is None
        assert shared_memory._mapped([[os.getpid(), other, b"o" * len(token)]], size) is not None
    finally:
        for one in opened:
            os.close(one)


def keeps(group: ProcessGroup) -> None:
    kept: list[Any] = []
    then: list[Any] = []
    fit = fitting(trainer(max_iterations=4), seeded(mlp), group)
    for event in fit.run():
        if isinstance(event, Stepped):
            kept += [one.grad for one in fit.model.object.parameters()]
            then += [one.clone() for one in kept[len(then) :]]
    assert len(kept) >= 8
    assert all(torch.equal(a, b) for a, b in zip(kept, then, strict=True))


def test_gradients_that_a_user_keeps_are_not_written_again(tmp_path: Path) -> None:
    run(2, tmp_path, keeps)
