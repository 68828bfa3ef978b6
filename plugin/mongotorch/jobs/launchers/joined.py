"""Runs ranks in processes that somebody else has started: `torchrun`, Slurm, or an operator of Kubernetes.

Each of them calls `follow`, but for rank 0, whose run calls `JoinedLauncher.run`. They have all joined the
default group of `torch.distributed` before.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, final

from mongotorch.errors import MongotorchError, UnsupportedError, WorkerLostError
from mongotorch.jobs.launchers.base import Launcher, RankCall

_LOOK_S: Final = 0.5


@final
class JoinedLauncher(Launcher):
    """Runs the ranks in the processes of the default group of `torch.distributed`, of which this one is rank 0."""

    name = "joined"

    def check(self) -> None:
        """See `Launcher.check`."""
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            raise UnsupportedError(
                "the launcher 'joined' is for processes that torchrun, or the like, has started: "
                "torchrun --nproc-per-node 4 -m mongotorch run-job JOB",
                setting="launcher",
            )

    def free(self, resources: Mapping[str, Any], *, device: str) -> int | None:  # noqa: ARG002
        """The number of processes. Raises: UnsupportedError, more of them than devices on this machine."""
        import torch
        import torch.distributed as dist

        here, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if device == "cuda" and here > devices:
            raise UnsupportedError(
                f"{here} processes were started on this machine, and each needs a CUDA device of its own, of "
                f'which there are {devices}; start so many, or give compute_kwargs={{"device": "cpu"}}',
                setting="launcher",
            )
        return dist.get_world_size()

    def run(
        self,
        call: RankCall,
        *,
        workers: int,
        resources: Mapping[str, Any],  # noqa: ARG002
        device: str,  # noqa: ARG002
        check: Callable[[], None],
    ) -> None:
        """Call the function here, and on all other ranks; see `Launcher.run`."""
        import torch.distributed as dist

        if workers != dist.get_world_size():
            raise UnsupportedError(
                f"{dist.get_world_size()} processes were started, and the trainer's lanes and workers allow "
                f"{workers}; start so many",
                setting="launcher",
            )
        with _checking(check) as errors:
            dist.broadcast_object_list([call])
            try:
                call()
            except MongotorchError:
                if errors:
                    raise errors[0] from None
                raise
        if errors:
            raise errors[0]


def follow() -> bool:
    """Be another rank than 0: call what rank 0 has its launcher call, when it does.

    Returns:
        Whether there was something to call.

    Raises:
        WorkerLostError: Rank 0 is gone.
        Exception: What the function raised.
    """
    import torch.distributed as dist

    given: list[RankCall | None] = [None]
    try:
        dist.broadcast_object_list(given)
    except RuntimeError as error:  # what torch raises for a closed connection
        raise WorkerLostError("rank 0 is gone: it has failed, or was killed; its output says more") from error
    if given[0] is None:
        return False
    given[0]()
    return True


def dismiss() -> None:
    """Let the other ranks return from `follow`, where rank 0 has nothing to call."""
    import torch.distributed as dist

    nothing: list[RankCall | None] = [None]
    dist.broadcast_object_list(nothing)


@contextlib.contextmanager
def _checking(check: Callable[[], None]) -> Any:
    """Call a check again and again, from a thread; what it raises is in the list."""
    ended, errors = threading.Event(), list[Exception]()

    def look() -> None:
        while not errors and not ended.wait(_LOOK_S):
            try:
                check()
            except Exception as error:  # noqa: BLE001 - raised in the run
                errors.append(error)

    thread = threading.Thread(target=look, name="mongotorch-check", daemon=True)
    thread.start()
    try:
        yield errors
    finally:
        ended.set()
        thread.join()
