"""Torch's worker processes, for one function on items.

Always: results come out in the order of the items; an error raised in a worker is raised where its result would
have come out; closing ends the processes, and so does the death of the process that started them.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mongotorch.data.demand import Demand
from mongotorch.errors import MongotorchError

_NICE = 10  # added to the niceness, of -20 to 19


@final
class _Failure:
    """An error on its way out of a worker: torch would rebuild it from its message alone."""

    def __init__(self, error: MongotorchError) -> None:
        self.error = error


@final
class _Work(Dataset[Any]):
    """What a worker does with one item."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __getitem__(self, item: Any) -> Any:
        try:
            return self._function(item)
        except MongotorchError as error:
            return _Failure(error)


@final
class _Begin:
    """What a worker does first: where it is crowded, it gives way, to the one who takes its results above all."""

    def __init__(self, also: Callable[[int], Any] | None, *, crowded: bool) -> None:
        self._also, self._crowded = also, crowded

    def __call__(self, worker: int) -> None:
        if self._crowded and hasattr(os, "nice"):
            os.nice(_NICE)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        if self._also is not None:
            self._also(worker)


def _end_with_parent() -> None:
    """Torch's workers notice as well that their parent is gone, and then wait for ever for it to take a result."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@final
class _Feed(Sampler[Any]):
    """Hands the items of this epoch to the workers."""

    def __init__(self) -> None:
        self.items: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.items


@final
class Workers:
    """Worker processes that do one function on items, in order.

    Args:
        function: Done in the workers; gets one item, returns one result.
        options: Options of `torch.utils.data.DataLoader`.
        demand: Told when somebody waits for a result, and when nobody wants one any more; kept as an attribute.
    """

    def __init__(
        self, function: Callable[[Any], Any], options: Mapping[str, Any], demand: Demand | None = None
    ) -> None:
        self.demand = demand or Demand(crowded=False)
        self._feed = _Feed()
        self._options = dict(options)
        self._generator = self._options.pop("generator", None)
        self._own = torch.Generator()
        also = self._options.pop("worker_init_fn", None)
        self._loader: DataLoader[Any] = DataLoader(
            _Work(function),
            sampler=self._feed,
            batch_size=None,
            collate_fn=_same,
            generator=self._generator or self._own,
            worker_init_fn=_Begin(also, crowded=self.demand.crowded),
            **self._options,
        )

    def map(self, items: Iterator[Any], seed: int) -> Iterator[Any]:
        """The results of the items; workers are seeded by `seed`, not by the global generator.

        Args:
            items: Taken when a worker has room.
            seed: Of the workers' generators.
        """
        self._feed.items = items
        self.demand.asked()
        if self._generator is None:
            self._own.manual_seed(seed)
        results = iter(self._loader)
        try:
            for result in results:
                self.demand.met()
                if isinstance(result, _Failure):
                    raise result.error
                yield result
                self.demand.asked()
        finally:
            self.demand.drop()
            del results
            if not self._options.get("persistent_workers"):
                self.close()

    def close(self) -> None:
        """End the processes that are kept for the next epoch."""
        iterator = self._loader._iterator
        self._loader._iterator = None
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def _same(item: Any) -> Any:
    return item
