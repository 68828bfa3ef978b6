"""Runs ranks on the nodes of a Ray cluster, by Ray Train.

The launcher itself does not load Ray: its driver does, which connects to the cluster that `RAY_ADDRESS` names.
What crosses to the nodes are the name of a function, the uuid of a job and a few numbers; each node opens the
database that its own environment names. Ray restarts nothing and keeps no checkpoint: jobs and MongoDB do that.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final, final

import bson

from mongotorch.errors import JobProcessError, SettingError, UnsupportedError
from mongotorch.jobs.launchers.base import Launcher, RankCall
from mongotorch.jobs.launchers.driver import Drive, description_of, run_driver, write_description

GROUP_TIMEOUT_S: Final = 600
"""How long a rank waits for the others, where the network does not say that they are gone."""
CONNECT_S: Final = 15.0
"""How long the launcher looks for the cluster."""
_NO_FAILURES: Final[dict[str, Any]] = {"max_failures": 0, "controller_failure_limit": 0}
_DEFAULT_RESOURCES: Final = {"CPU": 1.0}


@final
class RayLauncher(Launcher):
    """Runs ranks on the nodes of a Ray cluster."""

    name = "ray"
    is_on_one_machine = False

    def check(self) -> None:
        """See `Launcher.check`."""
        if importlib.util.find_spec("ray") is None:
            raise UnsupportedError(
                "the launcher 'ray' needs Ray: pip install 'mongotorch[ray]'", setting="launcher"
            )

    def free(self, resources: Mapping[str, Any], *, device: str) -> int | None:
        """For how many ranks the cluster has free resources now.

        Raises:
            SettingError: `RAY_ADDRESS` is not set, or its cluster cannot be used, as one of another version.
        """
        available = _available()
        needed = _needed(resources, device)
        return min(int(available.get(name, 0.0) / amount + 1e-9) for name, amount in needed.items() if amount > 0)

    def run(
        self,
        call: RankCall,
        *,
        workers: int,
        resources: Mapping[str, Any],
        device: str,
        check: Callable[[], None],
    ) -> None:
        """Call the function on every rank; see `Launcher.run`."""
        options = {"resources": _needed(resources, device)}
        run_driver(f"{__name__}:drive", call, workers=workers, check=check, options=options)


def _needed(resources: Mapping[str, Any], device: str) -> dict[str, float]:
    """What a rank needs: what was asked for, else one core, and one GPU where it computes on one."""
    given = dict(resources) or {**_DEFAULT_RESOURCES, **({"GPU": 1.0} if device == "cuda" else {})}
    if not any(amount > 0 for amount in given.values()):
        return dict(_DEFAULT_RESOURCES)
    return given


def _address() -> str:
    found = os.environ.get("RAY_ADDRESS")
    if not found:
        raise SettingError(
            "RAY_ADDRESS is not set: it has to name the cluster, such as 10.0.0.5:6379, or be `auto` on one of "
            "its nodes",
            setting="launcher",
        )
    return found


def _available() -> dict[str, float]:
    """The free resources of the cluster, asked by a process of its own: this one stays free of Ray."""
    address = _address()
    code = f"from {__name__} import print_available; print_available()"
    try:
        ran = subprocess.run(  # noqa: S603
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=CONNECT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise SettingError(
            f"no Ray cluster answers at RAY_ADDRESS={address} within {CONNECT_S:g} s", setting="launcher"
        ) from error
    marked = [line for line in ran.stdout.splitlines() if line.startswith(_MARK)]
    if not marked:
        lines = [line for line in ran.stderr.splitlines() if line.strip()]
        why = lines[-1] if lines else f"its process ended with exit code {ran.returncode}"
        raise SettingError(f"the Ray cluster at RAY_ADDRESS={address} cannot be used: {why}", setting="launcher")
    pairs = (part.split("=") for part in marked[0].removeprefix(_MARK).split())
    return {name: float(amount) for name, amount in pairs}


_MARK: Final = "mongotorch-available: "


def print_available() -> None:
    """Print the free resources of the cluster on one line."""
    import ray

    _connect()
    resources: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    found = {name: amount for name, amount in resources.items() if not set(name) & {" ", "="}}
    print(_MARK + " ".join(f"{name}={amount}" for name, amount in found.items()))  # noqa: T201
    sys.stdout.flush()
    os._exit(0)


def _connect() -> None:
    import ray

    ray.init(address=_address(), log_to_driver=True, logging_level=logging.ERROR, configure_logging=True)


# In the driver, and on the nodes


class RankRaisedError(Exception):
    """What a rank raised, described; Ray brings it from the node to the driver.

    Args:
        rank: Which rank.
        content: The description, as BSON.
    """

    def __init__(self, rank: int, content: bytes) -> None:
        super().__init__(rank, content)
        self.rank, self.content = rank, content

    def __str__(self) -> str:
        error = bson.decode(self.content)["error"]  # what Ray logs: the text, and not these bytes
        return f"rank {self.rank}: {error['type']}: {error['message']}"


def drive(what: Drive) -> None:
    """Run the ranks, in the driver.

    Raises:
        JobProcessError: A rank, or its node, ended.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # what ranks say may go into a log
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer

    _connect()
    resources = dict(what.options["resources"])
    uses_gpu = resources.get("GPU", 0) > 0
    trainer = TorchTrainer(
        _rank,
        train_loop_config={"function": what.call.function, "arguments": dict(what.call.arguments)},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if uses_gpu else "gloo", timeout_s=GROUP_TIMEOUT_S),
        scaling_config=ScalingConfig(num_workers=what.workers, use_gpu=uses_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name=what.folder.name,
            storage_path=str(what.folder / "ray"),
            failure_config=FailureConfig(**_NO_FAILURES),
        ),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        found = {rank: _raised(failure) for rank, failure in error.worker_failures.items()}
        for rank, raised in found.items():
            if raised is not None:
                write_description(what.folder, str(rank), bson.decode(raised.content))
        dead = sorted(rank for rank, raised in found.items() if raised is None)
        if dead:
            raise JobProcessError(
                f"the process of rank {dead[0]} of {what.workers}, or its node, ended: "
                f"{_first_line(error.worker_failures[dead[0]])}"
            ) from error
        os._exit(1)
    except TrainingFailedError as error:
        raise JobProcessError(f"Ray could not run {what.workers} ranks: {_first_line(error)}") from error


def _raised(failure: BaseException) -> RankRaisedError | None:
    """The description inside what Ray makes of an error."""
    for found in (failure, getattr(failure, "_base_exc", None), failure.__cause__):
        if isinstance(found, RankRaisedError):
            return found
    return None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _rank(config: Mapping[str, Any]) -> None:
    """One rank, on its node, in a thread that Ray has started."""
    rank = int(os.environ["RANK"])
    try:
        RankCall(function=config["function"], arguments=config["arguments"])()
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the error of the run
        content = description_of(error, where=f"rank {rank} of {{workers}}")
        raise RankRaisedError(rank, bson.encode(content)) from None
