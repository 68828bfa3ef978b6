"""Reads the options of a compute engine: how many workers train, and into how many lanes a step is cut.

The rows of a step (`batch_size` x `gradient_accumulation_steps`, counted over all workers) are cut into lanes, as
evenly as they can be: the first lanes have one row more where it is needed, the last ones may be empty. A worker
computes its lanes one after the other. The number of lanes is fixed for a run, that of workers is not.

Guarantees: which rows a lane has does not depend on the number of workers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self, final

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from mongotorch.errors import ParameterError
from mongotorch.train.parallel.group import Reduce

COMPUTE_OPTIONS: Final = frozenset({"device", "num_workers", "workers", "lanes", "reduce", "resources", "threads"})
_MOST: Final = 4096  # workers and lanes


@final
@dataclass(frozen=True, kw_only=True)
class Lanes:
    """How the rows of a step are cut, and on how many workers they are computed.

    Attributes:
        workers: The least and the most workers, of which each trains on a part of the rows.
        lanes: Into how many parts the rows of a step are cut, a power of two; 1 is a plain run on one worker.
        reduce: How the gradients of the workers are added up, see `Group`.
        resources: What a worker needs, such as `{"GPU": 1}`, for launchers that ask for it.
        threads: Threads that torch computes with on a CPU in each worker; None leaves them as they are.
        accumulation: The trainer's `gradient_accumulation_steps`.
    """

    workers: tuple[int, int] = (1, 1)
    lanes: int = 1
    reduce: Reduce = "exact"
    resources: Mapping[str, float] = field(default_factory=dict)
    threads: int | None = None
    accumulation: int = 1

    @classmethod
    def of(
        cls,
        compute_kwargs: Mapping[str, Any] | None,
        batch_size: int = 1,
        gradient_accumulation_steps: int = 1,
    ) -> Self:
        """What `compute_kwargs` say of workers and lanes.

        Without `lanes` it is the smallest power of two that is at least the most workers and the accumulation;
        without `workers` and `lanes` it is 1, a plain run.

        Args:
            compute_kwargs: Those of a trainer.
            batch_size: Rows of a batch, over all workers.
            gradient_accumulation_steps: Batches of a step.

        Raises:
            ParameterError: They cannot be used; `field` is `compute_kwargs`.
        """
        options = dict(compute_kwargs or {})
        least, most = _range(options.get("workers", 1))
        lanes = options.get("lanes")
        if lanes is None:
            asked = max(most, gradient_accumulation_steps) if "workers" in options else 1
            lanes = 1 << (asked - 1).bit_length()
        _check_lanes(lanes, batch_size * gradient_accumulation_steps, gradient_accumulation_steps, (least, most))
        reduce = options.get("reduce", "exact")
        if reduce not in ("exact", "fast"):
            raise _refused(f"reduce={reduce!r} must be 'exact' or 'fast'")
        threads = options.get("threads")
        if threads is not None:
            _check_count("threads", threads)
        return cls(
            workers=(least, most),
            lanes=lanes,
            reduce=reduce,
            resources=_resources(options.get("resources")),
            threads=1 if threads is None and lanes > 1 else threads,
            accumulation=gradient_accumulation_steps,
        )

    @property
    def is_plain(self) -> bool:
        """Whether there is one lane: one worker computes whole batches, as without any of this."""
        return self.lanes == 1

    @property
    def possible(self) -> tuple[int, ...]:
        """The numbers of workers that it can run on, ascending; each has as many lanes as the others."""
        return _divisors(self.lanes, self.workers)

    def training_stream(self, rank: int, world: int) -> dict[str, Any]:
        """The fields of a `StreamSpec` that give a rank the batches of its lanes; empty for a plain run.

        Args:
            rank: Which worker, from 0.
            world: How many there are.

        Raises:
            ParameterError: The lanes cannot be shared by so many.
        """
        self.check_world(world)
        if self.is_plain:
            return {}
        return {"shard": (rank, world), "lanes": self.lanes, "accumulation": self.accumulation}

    def validation_stream(self, rank: int, world: int) -> dict[str, Any]:
        """The fields of a `StreamSpec` that give a rank each world-th validation batch; empty where it has all.

        Raises:
            ParameterError: The lanes cannot be shared by so many.
        """
        self.check_world(world)
        return {} if world == 1 else {"shard": (rank, world), "shard_by": "batches"}

    def mine(self, rank: int, world: int) -> range:
        """The numbers of the lanes of a rank."""
        each = self.lanes // world
        return range(rank * each, (rank + 1) * each)

    def check_module(self, module: nn.Module, world: int, *, drops_last: bool) -> None:
        """Refuse a module that several lanes cannot train.

        Args:
            module: What is trained.
            world: How many workers there are.
            drops_last: Whether a last batch that is not full is left out.

        Raises:
            ParameterError: It has no parameters yet, or waits in each lane for all workers.
        """
        if any(is_lazy(part) for part in (*module.parameters(), *module.buffers())):
            raise ParameterError(
                "the module has no parameters before its first batch, and each worker would make other ones; give "
                "their sizes, or call the module once before it is applied",
                field="object",
            )
        waits = any(isinstance(part, nn.SyncBatchNorm) for part in module.modules())
        if waits and world > 1 and (self.lanes != world or not drops_last):
            raise ParameterError(
                f"SyncBatchNorm waits in each lane for all workers: give as many lanes as workers (there are "
                f'{self.lanes} and {world}), and loader_kwargs={{"drop_last": True}}',
                field="object",
            )

    def check_device(self, device: torch.device) -> None:
        """Refuse a device that several workers cannot each have one of. Raises: ParameterError."""
        if device.type == "cpu" or self.workers[1] == 1:
            return
        if device.type != "cuda":
            raise _refused(
                f"several workers compute on CPUs or CUDA devices, and this run would on {device.type!r}; give "
                '"device": "cpu", or one worker'
            )
        if device.index is not None:
            raise _refused(
                f"the device {str(device)!r} is one, and each of several workers needs its own; name it 'cuda', "
                "here or in the model's preferred_devices"
            )

    def check_world(self, world: int) -> None:
        """Refuse a number of workers that the lanes cannot be shared by. Raises: ParameterError."""
        possible = _divisors(self.lanes, (1, self.lanes))
        if world not in possible:
            raise _refused(
                f"{world} worker(s) cannot share {self.lanes} lanes evenly; possible are "
                f"{', '.join(map(str, possible))} workers"
            )


@contextlib.contextmanager
def pinned_threads(threads: int) -> Iterator[None]:
    """Let torch compute with so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_compute(options: Mapping[str, Any]) -> None:
    """Refuse options that no compute engine reads. Raises: ParameterError."""
    unknown = sorted(set(options) - COMPUTE_OPTIONS)
    if unknown:
        known = ", ".join(sorted(COMPUTE_OPTIONS))
        raise ParameterError(f"compute_kwargs: {unknown} are not known; known are {known}", field="compute_kwargs")
    workers = options.get("num_workers", 0)
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise _refused(f"num_workers={workers!r} must be 0 or more")
    device = options.get("device", "cpu")
    if not isinstance(device, str):
        raise _refused(f"device={device!r} must be a name")


def _refused(text: str) -> ParameterError:
    return ParameterError(f"compute_kwargs: {text}", field="compute_kwargs")


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST:
        raise _refused(f"{name}={value!r} must be a whole number from 1 to {_MOST}")


def _range(workers: Any) -> tuple[int, int]:
    """The least and the most workers."""
    pair = workers if isinstance(workers, list | tuple) else (workers, workers)
    if len(pair) != 2:
        raise _refused(f"workers={workers!r} must be a number, or (least, most)")
    for one in pair:
        _check_count("workers", one)
    if pair[0] > pair[1]:
        raise _refused(f"workers={workers!r} must be (least, most)")
    return pair[0], pair[1]


def _divisors(lanes: int, workers: tuple[int, int]) -> tuple[int, ...]:
    return tuple(n for n in range(workers[0], min(workers[1], lanes) + 1) if lanes % n == 0)


def _check_lanes(lanes: Any, rows: int, accumulation: int, workers: tuple[int, int]) -> None:
    _check_count("lanes", lanes)
    if lanes & (lanes - 1):
        raise _refused(f"lanes={lanes} must be a power of two, such as {1 << lanes.bit_length()}")
    if lanes == 1 and workers[1] == 1:
        return
    if workers[1] > lanes:
        raise _refused(f"workers={workers[1]} are more than lanes={lanes}: a worker computes one lane at least")
    if not _divisors(lanes, workers):
        possible = ", ".join(map(str, _divisors(lanes, (1, lanes))))
        shown = workers[0] if workers[0] == workers[1] else workers
        raise _refused(
            f"workers={shown}: the {lanes} lanes of a step cannot be shared evenly by so many; "
            f"possible are {possible} workers"
        )
    if lanes < accumulation:
        raise _refused(
            f"lanes={lanes} are fewer than gradient_accumulation_steps={accumulation}: a lane would have more "
            "rows than batch_size"
        )
    if lanes > rows:
        raise _refused(
            f"a step has {rows} row(s) (batch_size x gradient_accumulation_steps, over all workers), too few for "
            f"lanes={lanes}; give loader_kwargs a larger batch_size"
        )


def _resources(given: Any) -> dict[str, float]:
    if given is None:
        return {}
    is_amount = isinstance(given, Mapping) and all(
        isinstance(name, str) and not isinstance(amount, bool) and isinstance(amount, int | float) and amount >= 0
        for name, amount in given.items()
    )
    if not is_amount:
        raise _refused(f'resources={given!r} must be amounts by name, such as {{"GPU": 1}}')
    return dict(given)
