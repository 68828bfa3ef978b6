"""A checkpoint costs the training thread one copy of the state, counted in bytes: no clock can be wrong here."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from tests.helpers import SELECT, fit, net, trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mongotorch.services.training.checkpoints import CheckpointWriter
from mongotorch.train import Fit, Stepped, Validated


class Copied(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all copies of tensors inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func.name())
        if isinstance(result, Tensor) and name.startswith(("aten::clone", "aten::_to_copy", "aten::copy_")):
            self.nbytes += result.nbytes
        return result


def nbytes(state: Any) -> int:
    if isinstance(state, Tensor):
        return int(state.nbytes)
    parts = state.values() if isinstance(state, Mapping) else state if isinstance(state, list | tuple) else ()
    return sum(map(nbytes, parts))


def stall(run: Fit, writer: CheckpointWriter) -> tuple[int, int]:
    """Bytes that were copied for a checkpoint, and bytes of model and optimizer in it."""
    with Copied() as copied:
        state = run.capture()
        writer.write(state)
    return copied.nbytes, nbytes(state["model"]) + nbytes(state["optimizer"])


def test_between_two_validations_a_checkpoint_copies_the_state_once() -> None:
    written: list[Any] = []
    run = fit(trainer(SELECT, max_iterations=3, validation_interval=None), net())
    with CheckpointWriter(written.append, interval_s=0) as writer:
        for event in run.run():
            assert isinstance(event, Stepped)
            copied, held = stall(run, writer)
            assert held > 0
            assert held <= copied <= 1.05 * held
        writer.flush()
    assert written


def test_after_a_better_validation_the_copy_of_the_best_is_the_checkpoint() -> None:
    run = fit(trainer(SELECT, max_iterations=4, validation_interval=2), net())
    seen = 0
    with CheckpointWriter(lambda state: None, interval_s=0) as writer:
        for event in run.run():
            if isinstance(event, Validated) and event.improved:
                seen += 1
                copied, held = stall(run, writer)
                assert held > 0
                assert copied <= 0.05 * held
    assert seen


def test_writing_never_makes_the_run_wait() -> None:
    """The thread that writes is held up for ever: `write` returns all the same, and keeps only the newest."""
    free = threading.Event()
    written: list[int] = []

    def save(state: Mapping[str, Any]) -> None:
        free.wait(30)
        written.append(state["step"])

    with CheckpointWriter(save, interval_s=0) as writer:
        for step in range(50):
            writer.write({"step": step})
        free.set()
        writer.flush()
    assert written[-1] == 49
    assert len(written) <= 2
