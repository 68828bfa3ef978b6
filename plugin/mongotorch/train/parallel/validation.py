"""Deals out batches that are measured to the ranks of a group, and puts together what they measured.

Guarantees: all ranks take in the same measures in the order of the batches, so that sums have the same bits on any
number of ranks. What a batch draws belongs to (seed, step, set, batch). Where one rank fails, all raise its error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, TypeVar, final

import torch

from mongotorch.tensors import to_device
from mongotorch.train.generators import waiting
from mongotorch.train.parallel.group import Group, portable, raise_first
from mongotorch.train.parallel.lane_step import seed_generators

P = TypeVar("P")
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

    def on_cpu(self) -> BatchMeasures:
        """The same as something that another process can read."""
        return self._replace(values=to_device(self.values, torch.device("cpu")))


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

        def measure(batch: Any, number: int) -> BatchMeasures:
            seed_generators(self.seed, self.step, name, number)
            return measuring.measure(batch, rows(batches, batch)).on_cpu()

        try:
            for part in in_order(self.group, batches, measure):
                measuring.add(part)
        except Exception as error:
            error.add_note(f"in the validation of the set {name!r}")
            raise


def in_order(group: Group, batches: Iterable[Any], measure: Callable[[Any, int], P]) -> Iterator[P]:
    """What all ranks measure, on every rank in the order of the batches, of which number i is of rank i mod world.

    Args:
        group: The ranks; all of them iterate to the end.
        batches: Those of this rank.
        measure: From a batch of this rank and its number to something that another process can read.

    Raises:
        WorkerLostError: Another rank is gone.
        Exception: What the batches or `measure` raised, on this rank or on another one.
    """
    # `iter` itself may raise too: inside of `try`.
    running, numbers = itertools.chain.from_iterable([batches]), itertools.count(group.rank, group.world)
    most = 1 if group.world == 1 else _EXCHANGED
    while True:
        parts, error = list[P](), None
        try:
            parts.extend(measure(batch, next(numbers)) for batch in itertools.islice(running, most))
        except Exception as raised:  # noqa: BLE001 - whatever it is, the other ranks have to hear of it
            error = raised
        with waiting():
            found = group.gather((parts, portable(error)))
        raise_first(group, error, [one for _, one in found])
        for part in itertools.chain(*itertools.zip_longest(*(each for each, _ in found))):
            if part is not None:
                yield part
        if max(len(each) for each, _ in found) < most:
            return
