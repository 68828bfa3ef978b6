"""Random draws of runs that share a process: each as if it were alone."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Generator

import numpy as np
import pytest
import torch
from tests.helpers import SELECT, fit, same, seeded, state, trainer
from torch import Tensor, nn

from mongotorch.train import Fit
from mongotorch.train.generators import RunGenerators, generator_state, set_generator_state


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))


def trained(seed: int) -> dict[str, Tensor]:
    module = seeded(dropping)
    list(fit(trainer(SELECT, seed=seed, max_iterations=20), module).run())
    return state(module)


def draws(count: int) -> Generator[list[float]]:
    for _ in range(count):
        yield [torch.rand(1).item(), float(np.random.rand()), random.random()]


def test_runs_in_several_threads_end_as_each_alone() -> None:
    alone = [trained(seed) for seed in range(3)]
    found: dict[int, dict[str, Tensor]] = {}
    start = threading.Barrier(3, timeout=30)

    def run(seed: int, one: Fit, module: nn.Module) -> None:
        start.wait()
        list(one.run())
        found[seed] = state(module)

    modules = [seeded(dropping) for _ in range(3)]
    runs = [fit(trainer(SELECT, seed=seed, max_iterations=20), modules[seed]) for seed in range(3)]
    threads = [threading.Thread(target=run, args=(seed, runs[seed], modules[seed])) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(same(found[seed], alone[seed]) for seed in range(3))


def test_runs_that_alternate_end_as_each_alone_and_leave_the_program_its_generators() -> None:
    alone = [list(RunGenerators(seed).drawing(draws(5))) for seed in (1, 2)]
    now = generator_state()
    expected = list(draws(1))
    set_generator_state(now)
    first, second = (RunGenerators(seed).drawing(draws(5)) for seed in (1, 2))
    pairs = list(zip(first, second, strict=True))
    first.close()
    assert [[a for a, _ in pairs], [b for _, b in pairs]] == alone
    assert list(draws(1)) == expected


def test_a_run_inside_a_step_of_another_leaves_it_undisturbed() -> None:
    def outer(nest: bool) -> Generator[list[float]]:
        for drawn in draws(3):
            if nest:
                list(RunGenerators(7).drawing(draws(4)))
            yield drawn

    assert list(RunGenerators(1).drawing(outer(nest=True))) == list(RunGenerators(1).drawing(outer(nest=False)))


def test_a_checkpoint_of_one_of_two_runs_goes_on_to_the_same_weights() -> None:
    whole = trained(1)
    module = seeded(dropping)
    run = fit(trainer(SELECT, seed=1, max_iterations=20), module)
    other = fit(trainer(SELECT, seed=2, max_iterations=20), seeded(dropping))
    events, others = run.run(), other.run()
    for _ in range(7):
        next(events)
        next(others)
    captured = run.capture()
    events.close()
    next(others)

    resumed = seeded(dropping)
    list(fit(trainer(SELECT, seed=1, max_iterations=20), resumed, state=captured).run())
    others.close()
    assert same(state(resumed), whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_can_run_while_its_parent_does() -> None:
    def forking() -> Generator[bool]:
        child = os.fork()
        if child == 0:
            done: list[bool] = []

            def run() -> None:
                done.append(len(list(RunGenerators(1).drawing(draws(2)))) == 2)

            thread = threading.Thread(target=run, daemon=True)  # the lock of its parent's turn is this thread's
            thread.start()
            thread.join(10)
            os._exit(0 if done else 1)
        yield os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    assert list(RunGenerators(1).drawing(forking())) == [True]
