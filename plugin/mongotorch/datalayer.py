"""The Datalayer: one open database, and everything a person does with it.

Always: it owns its connection and closes it; it holds no other state, so two of them over one database see the
same; it is never pickled: what crosses a process is an address.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Self, final

from mongotorch.component import Component
from mongotorch.data import Explanation, Stream, explain
from mongotorch.errors import ParameterError
from mongotorch.owner import Owner
from mongotorch.query import Fold, Query
from mongotorch.run import Job, Shift
from mongotorch.settings import Settings, read_settings
from mongotorch.store import Collected, Connection, Garbage, Verified, open_address
from mongotorch.train import TorchTrainer
from mongotorch.wiring.collection import Collection, read_documents
from mongotorch.wiring.parts import Parts
from mongotorch.wiring.streams import stream_spec, training_spec


@final
class Datalayer(Owner):
    """One open database; a context manager that closes it."""

    __mongotorch_unpicklable__: ClassVar[bool] = True

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self.settings = settings
        self._connection = connection
        self._parts = Parts(connection, settings)

    @classmethod
    def connect(cls, uri: str | None = None, **settings: Any) -> Self:
        """Open a database.

        Args:
            uri: `mongodb://…`, `mongodb+srv://…`, `mongomock://NAME` or `embedded:PATH`; None is the setting
                `uri` (`MONGOTORCH_URI`), else the embedded server over `embedded_path`.
            settings: See `Settings`; over the environment.

        Raises:
            SettingError: The URI or a setting cannot be used.
            ServerUnavailableError: Nothing answers there.
            EmbeddedServerError: The embedded server is missing here, or does not start.
        """
        chosen = read_settings(**settings, **({} if uri is None else {"uri": uri}))
        address = chosen.uri or f"embedded:{chosen.embedded_path}"
        connection = open_address(address, chosen)
        try:
            return cls(connection, chosen)
        except BaseException:
            connection.close()
            raise

    def __repr__(self) -> str:
        return f"Datalayer({self._connection!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        raise ParameterError(
            "a Datalayer holds a connection and cannot be pickled; pass `db.uri` and connect there"
        )

    def close(self) -> None:
        """Close the connection. Again: nothing."""
        self._connection.close()

    @property
    def uri(self) -> str:
        """The address with the database in it; it may hold a password."""
        return self._connection.uri

    @property
    def shift(self) -> Shift:
        """Where a `Worker` finds the jobs."""
        return self._parts.performer

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
                given), `prefetch_size`, `prefetch_factor` as in `TorchTrainer`; `drop_last`, `num_workers` and
                others as in `torch.utils.data.DataLoader`.

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
        return explain(self._connection.database, spec, step_seconds=step_seconds)

    def apply(self, component: Component, *, force: bool = False, priority: int = 0) -> Job[Any]:
        """Store a component as a new version and start what it has to run.

        Args:
            component: A trainer with a model, a model with a trainer, or anything that is only stored.
            force: Run although nothing changed.
            priority: Higher is run first, where jobs queue.

        Returns:
            A future; `result()` is the published model, for a component without a run the component.

        Raises:
            ParameterError: A trainer without a model.
            CodecError: A field cannot be stored; nothing was written.
            UnsafeClosureError: A field holds a database client; nothing was written.
            ConflictError: Its uuid belongs to a different component.
        """
        return self._parts.applier.apply(component, force=force, priority=priority)

    def job(self, uuid: str) -> Job[Any]:
        """A run, found again from anywhere. Raises: NotFoundError."""
        return self._parts.applier.job(uuid)

    def jobs(
        self, *, status: str | None = None, identifier: str | None = None, limit: int = 100
    ) -> list[Job[Any]]:
        """Runs, the newest first: `limit` at most, of one status or of the component of one name."""
        found = self._parts.jobs.find(status=status, identifier=identifier, limit=limit)
        return [self._parts.applier.job(record["_id"]) for record in found]

    def load(
        self,
        type_id: str | None = None,
        identifier: str | None = None,
        version: int | None = None,
        *,
        uuid: str | None = None,
        code: Any = None,
    ) -> Any:
        """A stored component, alone and unchanged.

        Args:
            type_id: `model`, `trainer`, `metric`, `validation`, `dataset`.
            identifier: Its name.
            version: Its version; None is the newest.
            uuid: Instead of all these: exactly that version.
            code: A module of the stored structure: its weights are filled in, and nothing that the database
                holds is unpickled, imported or executed.

        Raises:
            NotFoundError: There is none.
            ParameterError: Neither a uuid nor a kind and a name.
            PythonVersionError: It holds bytecode of another Python minor version; nothing was unpickled.
            IntegrityError: A blob is not what was stored.
        """
        found = self._parts.loader.find(type_id, identifier, version, uuid=uuid)
        return self._parts.loader.load(found) if code is None else self._parts.loader.with_code(found, code)

    def show(self, type_id: str | None = None, identifier: str | None = None, version: int | None = None) -> Any:
        """What there is: kinds, identifiers of a kind, versions of a name, or one version's whole document.

        Raises:
            NotFoundError: There is no such version.
        """
        if type_id is None:
            return self._parts.components.kinds()
        if identifier is None:
            return self._parts.components.identifiers(type_id)
        if version is None:
            return self._parts.components.versions(type_id, identifier)
        return self._parts.components.find(type_id, identifier, version)

    def remove(self, type_id: str, identifier: str, version: int | None = None, force: bool = False) -> int:
        """Remove a version, or all versions of a name where none is given; how many were removed.

        Args:
            type_id: The kind.
            identifier: The name.
            version: The version; None is all of them.
            force: Remove it although another component refers to it.

        Raises:
            NotFoundError: There is none.
            InUseError: Another component refers to it; nothing was removed.
        """
        return self._parts.remover.remove(type_id, identifier, version, force=force)

    def gc(self, dry_run: bool = False, *, grace_s: float = 3600.0) -> Collected:
        """Collect what no component, checkpoint or publication under way reaches.

        Args:
            dry_run: Only say what would be collected.
            grace_s: For how long something must have been unreached, in seconds; 0 only where nobody writes.
        """
        return Garbage(self._connection.database, grace_s=grace_s).collect(dry_run=dry_run)

    def verify(self) -> Verified:
        """Read and hash every blob, and check every component's signature; problems are reported, not raised."""
        return self._parts.checker.verify()
