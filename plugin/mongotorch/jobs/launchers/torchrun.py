"""Runs ranks on this machine by torch's own elastic launcher, as the command `torchrun` does.

The launcher does not restart ranks: a run goes on in the next attempt of its job, from its checkpoint. All that
listens, listens on 127.0.0.1.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, final

from mongotorch.jobs.launchers.base import Launcher, RankCall
from mongotorch.jobs.launchers.driver import Drive, RankEndedError, run_driver, run_rank

_HOST: Final = "127.0.0.1"
_PRELOADED: Final = ("mongotorch.worker.preload",)


@final
class TorchrunLauncher(Launcher):
    """Runs ranks on this machine, one process each; with CUDA one device each."""

    name = "torchrun"

    def free(self, resources: Mapping[str, Any], *, device: str) -> int | None:  # noqa: ARG002
        """The number of devices; None on the CPU."""
        if device != "cuda":
            return None
        import torch

        return torch.cuda.device_count()

    def run(
        self,
        call: RankCall,
        *,
        workers: int,
        resources: Mapping[str, Any],  # noqa: ARG002
        device: str,  # noqa: ARG002
        check: Callable[[], None],
    ) -> None:
        """Call the function on every rank; see `Launcher.run`."""
        run_driver(f"{__name__}:drive", call, workers=workers, check=check)


def drive(what: Drive) -> None:
    """Run the ranks, in the driver. Raises: RankEndedError."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # what it says is in the error of the job
    # By the name of the machine, which gloo takes otherwise, it may be found from outside, or not at all.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    # Forked from a process that has loaded torch and opened nothing: a rank is there at once.
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        [*_PRELOADED, what.call.function.partition(":")[0]]
    )
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=what.workers,
        max_restarts=0,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{_HOST}:0",
        local_addr=_HOST,
        run_id=what.folder.name,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(what.folder / "logs")),
    )
    try:
        elastic_launch(config, _rank)(what.call, what.folder)
    except ChildFailedError as error:
        raise RankEndedError({rank: failure.exitcode for rank, failure in error.failures.items()}) from error


def _rank(call: RankCall, folder: Path) -> None:
    """One rank."""
    run_rank(call, folder, int(os.environ["RANK"]))
