"""Deals out the batches of a validation to the ranks of a group, and puts together what they measured.

Guarantees: all ranks take in the same measures in the order of the batches, so that sums have the same bits on any
number of ranks. What a batch draws belongs to (seed, step, set, batch). Where one rank fails, all raise its error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, final

import torch

from mongotorch.tensors import to_device
from mongotorch.train.generators import waiting
from mongotorch.train.parallel.group import Group, portable, raise_first
from mongotorch.train.parallel.lane_step import seed_generators

_EXCHANGED: Final = 16  # batches that a rank measures before the ranks exchange what they found


@final
class BatchMeasures(NamedTuple):
    """What was measured of one batch.

    Attributes:
        loss: The objective.
        weight: What it counts.
        rows: Documents.
        values: Of each metric a number, or the outputs and targets where the metric is an object that is updated
            with them; or by name what `validate` gave.
    """

    loss: float
    weight: float
    rows: int
    values: Any


class Measuring(Protocol):
    """What measures the batches of one set."""

    def measure(self, batch: Any, rows: int) -> BatchMeasures:
        """Measure a batch of so many rows, without taking it in."""

    def add(self, part: BatchMeasures) -> None:
        """Take in what was measured of a batch."""


@final
@dataclass(frozen=True, kw_only=True)
class Dealt:
    """How the batches of a validation are dealt out: batch i to rank i mod world.

    Attributes:
        group: The ranks.
        seed: The trainer's.
        step: The step after which it is.
    """

    group: Group
    seed: int
    step: int

    def measure(
        self, measuring: Measuring, batches: Iterable[Any], rows: Callable[[Iterable[Any], Any], int], name: str
    ) -> None:
        """Measure the batches of this rank, and take in those of all ranks.

        Args:
            measuring: What measures them.
            batches: Those of this rank.
            rows: From the batches and one of them to how many documents that one has.
            name: The name of the set.

        Raises:
            WorkerLostError: Another rank is gone.
            MongotorchError, Exception: What measuring raised, on this rank or on another one.
        """
        running, numbers = iter(batches), itertools.count(self.group.rank, self.group.world)
        while True:
            parts, error = list[BatchMeasures](), None
            try:
                for batch in itertools.islice(running, _EXCHANGED):
                    seed_generators(self.seed, self.step, name, next(numbers))
                    parts.append(_on_cpu(measuring.measure(batch, rows(batches, batch))))
            except Exception as raised:  # noqa: BLE001 - whatever it is, the other ranks have to hear of it
                raised.add_note(f"in the validation of the set {name!r}")
                error = raised
            with waiting():
                found = self.group.gather((parts, portable(error)))
            raise_first(self.group, error, [one for _, one in found])
            for part in itertools.chain(*itertools.zip_longest(*(each for each, _ in found))):
                if part is not None:
                    measuring.add(part)
            if max(len(each) for each, _ in found) < _EXCHANGED:
                return


def _on_cpu(part: BatchMeasures) -> BatchMeasures:
    """The same as something that another process can read."""
    return part._replace(values=to_device(part.values, torch.device("cpu")))
