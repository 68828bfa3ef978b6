"""Gives each run the process's random generators for itself: those of torch, numpy and Python.

A module draws its dropout, and a transform its noise, from generators that a process has once. So runs take turns,
from one event to the next, and each finds the generators as it left them.

Guarantees: the draws of a run depend on its seed alone, also beside runs in other threads or inside a step of
another run; the program finds its generators as they were before the runs. Other threads of the program that draw
while a run is under way are not kept apart from it.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Generator, Iterator, Mapping
from typing import Any, TypeVar, final

import numpy as np
import torch

T = TypeVar("T")


@final
class RunGenerators:
    """The random generators of one run.

    Args:
        seed: Where they start.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._state: dict[str, Any] | None = None  # None before the first draw

    def drawing(self, source: Generator[T]) -> Generator[T]:
        """The items of a source that draws from these generators, each made in a turn of this run."""
        try:
            while True:
                turns = _turns  # another one in a new process
                before = turns.begin(self)
                try:
                    item = next(source)
                except StopIteration:
                    return
                finally:
                    turns.leave(before)
                yield item
        finally:
            source.close()
            _turns.end(self)

    def state(self) -> dict[str, Any]:
        """The state of the generators between two items."""
        return _turns.state(self)

    def save(self) -> None:
        """Take over the state of the process's generators."""
        self._state = generator_state()

    def load(self) -> None:
        """Give the process's generators this state."""
        if self._state is None:
            # numpy takes 32 bits only; torch takes 64.
            if torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available():
                torch.manual_seed(self._seed % 2**63)
            else:  # the same for the CPU, without three stack traces for devices that are not there
                torch.default_generator.manual_seed(self._seed % 2**63)
            np.random.seed(self._seed % 2**32)
            random.seed(self._seed)
        else:
            set_generator_state(self._state)


@final
class _Turns:
    """Whose state the process's generators have: one for the process, as the generators are."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._program = RunGenerators(0)
        self._active = self._program
        self._depth = 0
        self._owner = 0  # the thread that has a turn

    @contextlib.contextmanager
    def turn(self, run: RunGenerators) -> Iterator[None]:
        """Let a run draw inside; waits while a run of another thread has its turn."""
        before = self.begin(run)
        try:
            yield
        finally:
            self.leave(before)

    def begin(self, run: RunGenerators) -> RunGenerators:
        """Let a run draw until `leave`, and return the one that drew before; as `turn`, for each step of a run."""
        self._lock.acquire()
        before = self._active
        if before is not run:
            try:
                self._switch(run)
            except BaseException:
                self._lock.release()
                raise
        self._depth, self._owner = self._depth + 1, threading.get_ident()
        return before

    def leave(self, before: RunGenerators) -> None:
        """End the turn that `begin` gave."""
        try:
            self._depth -= 1
            if self._depth:  # a run inside a step of another one, which goes on now
                self._switch(before)
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Let others draw inside, if this thread has a turn, and that turn is not inside of another one."""
        run, thread = self._active, threading.get_ident()
        is_paused = self._owner == thread and self._depth == 1
        if is_paused:
            self._depth = self._owner = 0
            self._lock.release()
        try:
            yield
        finally:
            if is_paused:
                self._lock.acquire()
                self._depth, self._owner = 1, thread
                self._switch(run)

    def end(self, run: RunGenerators) -> None:
        """Give the generators back to the program."""
        with self._lock:
            if self._active is run:
                self._switch(self._program)

    def state(self, run: RunGenerators) -> dict[str, Any]:
        """The state of a run that is between two turns."""
        with self._lock:
            if self._active is run:
                run.save()
            return dict(run._state or {})

    def _switch(self, run: RunGenerators) -> None:
        if self._active is not run:
            self._active.save()
            run.load()
            self._active = run


_turns = _Turns()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let what is inside draw from generators of its own that start from a seed, in one turn."""
    generators = RunGenerators(seed)
    try:
        with _turns.turn(generators):
            yield
    finally:
        _turns.end(generators)


def waiting() -> contextlib.AbstractContextManager[None]:
    """A context in which the run that has its turn waits for something, and other runs may draw."""
    return _turns.pause()


def _after_fork() -> None:
    """A turn that another thread had is not in the new process."""
    global _turns
    _turns = _Turns()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def generator_state() -> dict[str, Any]:
    """The state of torch's (each CUDA device too), numpy's and Python's global generators."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, np.array(keys), int(position), int(has_gauss), float(cached)],
        "python": random.getstate(),
    }


def set_generator_state(state: Mapping[str, Any]) -> None:
    """Set all generators to what `generator_state` gave; CUDA devices that are not here are left out."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(list(state["cuda"]))
    np.random.set_state(tuple(state["numpy"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
