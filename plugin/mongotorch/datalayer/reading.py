"""What is read through a datalayer: collections, queries, the training stream alone.

Always: reading writes nothing but the plan of a stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mongotorch.data import Explanation, Stream, explain
from mongotorch.datalayer.base import Opened
from mongotorch.query import Fold, Query
from mongotorch.train import TorchTrainer
from mongotorch.wiring.collection import Collection, read_documents
from mongotorch.wiring.streams import stream_spec, training_spec


class Reading(Opened):
    """The part of a datalayer that reads documents."""

    def __getitem__(self, name: str) -> Collection:
        return Collection(self._connection.database[name], valid_fraction=self.settings.valid_fraction)

    def execute(self, query: Query) -> Iterator[dict[str, Any]]:
        """The documents of a query, read lazily, stored arrays as tensors.

        Raises:
            QueryError: The server refuses the query.
            ServerUnavailableError: The server cannot be read.
        """
        return read_documents(self._connection.database, query)

    def stream(
        self,
        query: Query,
        *,
        key: Any,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        shard: tuple[int, int] = (0, 1),
        fold: Fold | None = None,
        **options: Any,
    ) -> Stream:
        """The training stream alone, for a loop of one's own.

        Args:
            query: The documents.
            key: The fields of a sample, as in `TorchTrainer`.
            batch_size: Documents of a batch.
            shuffle: A new order each epoch; else the query's sort, else `_id`.
            seed: Of the order.
            shard: `(rank, world)`: disjoint parts with equal numbers of batches.
            fold: `train` or `valid`; None is both.
            options: `transform`, `signature`, `collate_fn`, `in_memory`, `download`, `data_prefetch` (True unless
                given), `prefetch_size`, `prefetch_factor` as in `TorchTrainer`; `across_epochs` (False unless
                given) lets the next epoch be read while the end of this one is served, as a trainer's stream
                does; `drop_last`, `num_workers` and others as in `torch.utils.data.DataLoader`.

        Returns:
            An `IterableDataset` of batches with `state_dict()`, to be closed or used as a context manager.

        Raises:
            ParameterError: An argument cannot be used; `field` names it.
            LoaderOptionError: An option that does not exist.
        """
        spec = stream_spec(
            self.settings,
            query if fold is None else query.fold(fold),
            options,
            key=key,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            shard=shard,
        )
        return Stream(self._connection.opener(), spec, database=self._connection.database)

    def explain(self, trainer: TorchTrainer, *, step_seconds: float | None = None) -> Explanation:
        """What reading will cost, told before training; the select's plan is found, and a few ranges are read.

        Args:
            trainer: Whose training documents are meant.
            step_seconds: What one training step takes, where that is known.

        Raises:
            EmptySelectError, FieldMissingError, QueryError, ServerUnavailableError: As training would.
        """
        spec = training_spec(trainer, self.settings)
        connection = self._connection
        return explain(connection.database, spec, connection.opener(), step_seconds=step_seconds)
