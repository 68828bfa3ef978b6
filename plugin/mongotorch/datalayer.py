"""The Datalayer: one open database, and everything a person does with it.

Always: it owns its connection and closes it; it holds no other state, so two of them over one database see the
same; it is never pickled: what crosses a process is an address. What it does is told apart by what a person wants:
`reading` documents, `running` work, keeping `versions`, `serving` one of them, `schedules`, their `lineage`; each
is a class, and the Datalayer is all of them.

What every part of a datalayer rests on: one open connection and the parts wired over it.

Always: it owns its connection and closes it; it holds no other state.

What is read through a datalayer: collections, queries, the training stream alone.

Always: reading writes nothing but the plan of a stream.

What runs through a datalayer: components are applied, and their jobs found again.

Always: a job is found from any process; where it runs is the setting `compute`.

What is served out of a datalayer: aliases are moved, and their history read.

Always: nothing here changes a stored version or a move that was made.

What is stored through a datalayer: versions are loaded, shown, removed, collected and verified.

Always: nothing here changes a stored version.

Where versions come from: how two differ, which ones a document went into, whether one comes out again.

Always: nothing here changes what is stored.

What is done with schedules through a datalayer: shown, paused, fired by hand, and asked about the past.

Always: a schedule is applied like any component; here is what is done with one that has been.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from types import EllipsisType
from typing import Any, ClassVar, Self, final

from mongotorch.component import Component
from mongotorch.data import Explanation, Stream, explain
from mongotorch.data.collection import Collection, read_documents
from mongotorch.errors import ParameterError
from mongotorch.jobs import Clockwork, Job, Shift
from mongotorch.mongo.connection import Connection, open_address
from mongotorch.query import Fold, Query
from mongotorch.resources import Owner
from mongotorch.schedule import Firing, Schedule
from mongotorch.services.composition import Services
from mongotorch.services.lineage import Diff, Reproduction, TrainedOn
from mongotorch.services.training.streams import stream_spec, training_spec
from mongotorch.services.versions.live import Live, OnPromote
from mongotorch.settings import Settings, read_settings
from mongotorch.store import LIVE, Collected, GarbageCollector, Move, Verified
from mongotorch.train import TorchTrainer


class Opened(Owner):
    """An open database."""

    __mongotorch_unpicklable__: ClassVar[bool] = True

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self.settings = settings
        self._connection = connection
        self._parts = Services(connection, settings)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._connection!r})"

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


class Lineage(Opened):
    """The part of a datalayer that knows where versions come from."""

    def diff(self, uuid1: str, uuid2: str) -> Diff:
        """How the version `uuid2` differs from `uuid1`: parameters, measurements, data, environment.

        Raises:
            NotFoundError: There is no such version.
            IntegrityError: A blob is not what was stored.
        """
        return self._parts.comparer.diff(uuid1, uuid2)

    def trained_on(self, document_id: Any, collection: str | None = None) -> list[TrainedOn]:
        """The versions whose training set held a document, the newest first.

        Args:
            document_id: Its `_id`.
            collection: Where it is; None asks of every collection.

        Returns:
            The versions; one whose training set was not kept document by document is there, but not `certain`.

        Raises:
            DataError: BSON cannot hold such an `_id`.
            IntegrityError: A blob is not what was stored.
        """
        return self._parts.comparer.trained_on(document_id, collection)

    def reproduce(self, uuid: str, *, anyway: bool = False) -> Reproduction:
        """Train a version again, here and now, and compare bits; nothing is published.

        Args:
            uuid: A model's that a run has published.
            anyway: Train although its data has changed since; else that is said, and nothing is trained.

        Raises:
            NotFoundError: There is no such version, or what it was trained from is gone.
            ParameterError: No run has published it.
            MongotorchError: What the run raises.
        """
        return self._parts.reproducer.reproduce(uuid, anyway=anyway)


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


class Running(Opened):
    """The part of a datalayer that has work done."""

    @property
    def shift(self) -> Shift:
        """Where a `Worker` finds the jobs."""
        return self._parts.performer

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


class Scheduling(Opened):
    """The part of a datalayer that sees to schedules."""

    @property
    def scheduler(self) -> Clockwork:
        """What watches and fires; a `Worker` runs it."""
        return self._parts.scheduler

    def schedules(self) -> list[dict[str, Any]]:
        """Every schedule's runtime document, by name.

        What a person looks for: `_id`, `paused`, `firings`, `next_at`, `state` (what has been counted), `last`
        (the newest firing), `outcome` (of the newest run that has ended), `problem`.
        """
        return self._parts.register.all()

    def pause(self, identifier: str) -> None:
        """Let a schedule fire no more by itself; what happens meanwhile is counted. Raises: NotFoundError."""
        self._parts.register.pause(identifier, paused=True)

    def resume(self, identifier: str) -> None:
        """Let a schedule fire again. Raises: NotFoundError."""
        self._parts.register.pause(identifier, paused=False)

    def fire(self, identifier: str, *, why: str = "by hand") -> Job[Any]:
        """Fire a schedule now, paused or not; a worker runs it.

        Args:
            identifier: The schedule.
            why: What the job says as its reason.

        Returns:
            The run; `result()` is the published model, live or not.

        Raises:
            NotFoundError: There is no such schedule.
            ConflictError: Others write the schedule all the time.
        """
        return self._parts.applier.job(self._parts.register.fire(identifier, reason=why))

    def preview(self, schedule: Schedule, *, since: datetime, until: datetime | None = None) -> list[Firing]:
        """When a schedule, applied or not, would have fired.

        Documents count as having arrived when their ObjectId was made; others are not seen.

        Args:
            schedule: The schedule.
            since: From when on; aware, or naive UTC.
            until: To when; None is now.

        Raises:
            ParameterError: Its trigger looks at measurements, which the past does not have.
        """
        return self._parts.register.preview(schedule, since=since, until=until)


class Serving(Opened):
    """The part of a datalayer that says which version counts."""

    def promote(
        self,
        type_id: str,
        identifier: str,
        version: int | None = None,
        uuid: str | None = None,
        *,
        alias: str = LIVE,
        why: str = "",
        who: str | None = None,
        expected: Move | EllipsisType | None = ...,
    ) -> Move:
        """Let an alias name a version: `load` gives it, and handles of `live` go over to it.

        Args:
            type_id: The kind.
            identifier: The name.
            version: The version; None is the newest, unless a uuid is given.
            uuid: Instead of the version.
            alias: The alias.
            why: Why, for the history.
            who: Who; None is user@host of this process.
            expected: The newest move as you know it, None for an alias that was never moved: if another has been
                made since, nothing is moved. Without it: what is there when this is called.

        Returns:
            The move; where the alias names that version already, the move that is there.

        Raises:
            NotFoundError: There is no such version, or it was removed meanwhile.
            ConflictError: Somebody else has moved the alias meanwhile; the message says who.
            ParameterError: A version and a uuid.
            IdentifierError: The alias is no name.
            TrustError: What is there is not what a trusted key signed.
        """
        return self._parts.promoter.promote(
            type_id, identifier, version, uuid, alias=alias, why=why, who=who, expected=expected
        )

    def rollback(
        self, type_id: str, identifier: str, *, alias: str = LIVE, why: str = "", who: str | None = None
    ) -> Move:
        """Let an alias name again what it named before its newest move; once more, and that is undone.

        Args:
            type_id: The kind.
            identifier: The name.
            alias: The alias.
            why: Why, for the history.
            who: Who; None is user@host of this process.

        Raises:
            NotFoundError: It named nothing before, or that version was removed.
            ConflictError: Somebody else has moved the alias meanwhile; the message says who.
            TrustError: What is there is not what a trusted key signed.
        """
        return self._parts.promoter.rollback(type_id, identifier, alias=alias, why=why, who=who)

    def history(
        self, type_id: str, identifier: str, *, alias: str = LIVE, at: datetime | None = None
    ) -> list[Move]:
        """The moves of an alias in their order, none left out.

        Args:
            type_id: The kind.
            identifier: The name.
            alias: The alias.
            at: The history as it stood then (aware, or naive UTC): its last move was in force. None: up to now.

        Raises:
            TrustError: A move is not what a trusted key signed.
        """
        return self._parts.aliases.history(type_id, identifier, alias, until=at)

    def live(
        self, type_id: str, identifier: str, *, alias: str = LIVE, on_promote: OnPromote | None = None
    ) -> Live:
        """A model that goes over to another version whenever the alias is moved, between two predictions.

        A thread of its own follows the alias: by a change stream, where there is none (mongomock, a server
        without a replica set) by looking once a second. It loads a version while the old one serves.

        Args:
            type_id: The kind: `model`.
            identifier: The name.
            alias: The alias. While `live` names nothing, the version is the newest there was when this was called.
            on_promote: Called with the model that served and the one that serves now, in that thread, after each
                change; what it raises is logged and kept in `error`.

        Returns:
            A handle with `predict` and `predict_batches`; close it, or use it as a context manager. It follows
            for as long as this datalayer is open.

        Raises:
            NotFoundError: There is no such version, or no such alias.
            ParameterError: It is no model.
            PythonVersionError: It holds bytecode of another Python minor version; nothing was unpickled.
            IntegrityError: A blob is not what was stored.
            TrustError: A signature does not hold.
        """
        return Live(
            connection=self._connection,
            components=self._parts.components,
            aliases=self._parts.aliases,
            loader=self._parts.loader,
            name=(type_id, identifier, alias),
            on_promote=on_promote,
        )


class Versions(Opened):
    """The part of a datalayer that keeps versions."""

    def load(
        self,
        type_id: str | None = None,
        identifier: str | None = None,
        version: int | None = None,
        *,
        uuid: str | None = None,
        alias: str | None = None,
        code: Any = None,
    ) -> Any:
        """A stored component, alone and unchanged.

        Args:
            type_id: `model`, `trainer`, `metric`, `validation`, `dataset`.
            identifier: Its name.
            version: Its version; None is the one that the alias names.
            uuid: Instead of all these: exactly that version.
            alias: The alias; None is `live`, or the newest version where `live` names none.
            code: A module of the stored structure: its weights are filled in, and nothing that the database
                holds is unpickled, imported or executed.

        Raises:
            NotFoundError: There is none, or no such alias.
            ParameterError: Neither a uuid nor a kind and a name; an alias with a version or uuid.
            PythonVersionError: It holds bytecode of another Python minor version; nothing was unpickled.
            IntegrityError: A blob is not what was stored.
            TrustError: A signature does not hold.
        """
        found = self._parts.loader.find(type_id, identifier, version, uuid=uuid, alias=alias)
        return self._parts.loader.load(found) if code is None else self._parts.loader.with_code(found, code)

    def show(
        self,
        type_id: str | None = None,
        identifier: str | None = None,
        version: int | None = None,
        *,
        uuid: str | None = None,
    ) -> Any:
        """What there is: kinds, identifiers of a kind, versions of a name, or one version's whole document.

        Args:
            type_id: The kind; None lists the kinds.
            identifier: The name; None lists the names of the kind.
            version: The version; None lists the versions of the name.
            uuid: Instead of all these: the document of exactly that version.

        Raises:
            NotFoundError: There is no such version.
            TrustError: It is not what a trusted key signed.
        """
        if uuid is not None:
            return self._parts.components.get(uuid)
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
            force: Remove it although another component refers to it or an alias names it; the alias then names
                nothing, and its history says `removed`.

        Raises:
            NotFoundError: There is none.
            InUseError: Another component refers to it, or an alias names it; nothing was removed.
        """
        removed = self._parts.remover.remove(type_id, identifier, version, force=force)
        if type_id == Schedule.type_id:
            self._parts.register.forget(identifier)
        return removed

    def gc(self, dry_run: bool = False, *, grace_s: float = 3600.0) -> Collected:
        """Collect what no component, checkpoint or publication under way reaches.

        Args:
            dry_run: Only say what would be collected.
            grace_s: For how long something must have been unreached, in seconds; 0 only where nobody writes.
        """
        return GarbageCollector(self._connection.database, grace_s=grace_s).collect(dry_run=dry_run)

    def verify(self) -> Verified:
        """Read and hash every blob, check every component and alias; problems are reported, not raised."""
        return self._parts.checker.verify()


@final
class Datalayer(Reading, Running, Versions, Serving, Scheduling, Lineage):
    """One open database; a context manager that closes it."""

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
