"""Ranks that are processes: all recipes, resumed with other numbers of ranks, and a rank that is killed."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.helpers import same, seeded
from tests.train.test_group import RECIPES, by_processes, digest, fitting, mlp, outcome, ran, trainer

from mongotorch.errors import ParameterError, WorkerLostError
from mongotorch.train import ProcessGroup, Stepped


@pytest.mark.parametrize("name", list(RECIPES)[:3])
def test_processes_give_the_bits_of_one(tmp_path: Path, name: str) -> None:
    found = by_processes([(2, 3), (4, 7), (1, 100)], tmp_path, name)
    assert [digest(one) for one in found[:2]] == [digest(one) for one in ran(name, 1)[1][:2]]


def left_alone(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", timedelta(seconds=30), rank=rank, world_size=2)
    fit = fitting(trainer(max_iterations=1000, validation_interval=None), seeded(mlp), ProcessGroup())
    try:
        for event in fit.run():
            if rank == 1 and event.step == 5:
                os.kill(os.getpid(), signal.SIGKILL)
    except WorkerLostError as error:
        Path(folder, "error").write_text(str(error), encoding="utf-8")


def test_the_others_hear_at_once_that_a_rank_was_killed(tmp_path: Path) -> None:
    spawn: Any = torch.multiprocessing.spawn  # type: ignore[attr-defined]
    context = spawn(left_alone, (str(tmp_path),), nprocs=2, join=False)
    context.processes[1].join(60)
    killed = time.monotonic()
    context.processes[0].join(60)
    assert time.monotonic() - killed < 20  # gloo itself would wait 30 s
    assert "rank 0 of 2 lost another worker" in (tmp_path / "error").read_text(encoding="utf-8")


def both_ways(rank: int, folder: str) -> None:
    """Sums of three ranks, and the fast one."""
    dist.init_process_group("gloo", f"file://{folder}/meet", timedelta(seconds=30), rank=rank, world_size=3)
    exact, fast = ProcessGroup(), ProcessGroup("fast")
    part = torch.tensor([1.0, 10.0 ** (6 * rank)])
    total, quick = part.clone(), part.clone()
    exact.sum([total])
    fast.sum([quick])
    assert total.tolist() == [3.0, torch.tensor(1.0).add(1e6).add(1e12).item()]
    assert quick[0] == 3.0
    assert exact.share({"from": rank}) == {"from": 0}
    assert exact.gather(rank) == [0, 1, 2]
    exact.close()
    with pytest.raises(ParameterError, match="init_process_group"):
        ProcessGroup()


def test_any_number_of_processes_can_be_a_group(tmp_path: Path) -> None:
    spawn: Any = torch.multiprocessing.spawn  # type: ignore[attr-defined]
    spawn(both_ways, (str(tmp_path),), nprocs=3)


def fast_process(rank: int, folder: str, parts: str) -> None:
    """One of four ranks that add up fast, and go on from a checkpoint as often as there are parts."""
    dist.init_process_group("gloo", f"file://{folder}/{parts}", timedelta(seconds=30), rank=rank, world_size=4)
    make, given = RECIPES["mlp, dropout, adam"]
    compute = {"workers": (1, 4), "lanes": 4, "reduce": "fast"}
    captured: Any = None
    for most in map(int, parts.split()):
        made = trainer(**given, compute_kwargs=compute)
        group = ProcessGroup("fast")
        fit = fitting(made, seeded(make), group, captured)
        run = fit.run()
        for event in run:
            if isinstance(event, Stepped) and event.step == most:
                break
        captured = group.share(fit.capture() if rank == 0 and most < 10 else None)
        if rank == 0 and most == 10:
            torch.save(outcome(fit)[0], f"{folder}/result {parts}")
        run.close()
    dist.barrier()
    group.close()


def test_a_fast_sum_restarts_with_the_same_bits_on_as_many_ranks(tmp_path: Path) -> None:
    start: Any = torch.multiprocessing.start_processes  # type: ignore[attr-defined]
    for parts in ("10", "3 7 10"):
        start(fast_process, (str(tmp_path), parts), nprocs=4, start_method="fork")
    whole, resumed = (torch.load(tmp_path / f"result {parts}") for parts in ("10", "3 7 10"))
    assert same(whole, resumed)
    exact = ran("mlp, dropout, adam", 1)[1][0]
    assert whole.keys() == exact.keys()
    for name, value in exact.items():  # other sums, of the same numbers
        torch.testing.assert_close(whole[name], value, rtol=1e-3, atol=1e-5)
