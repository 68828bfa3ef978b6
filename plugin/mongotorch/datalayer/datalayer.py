"""The Datalayer: one open database, and everything a person does with it.

Guarantees: it holds a connection, which it closes, and no other state, so two of them over one database see the
same. It is never pickled: what crosses to another process is an address.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, final, overload

from mongotorch.component import Component, arguments_checked
from mongotorch.data import DataCheck, Explanation, Stream
from mongotorch.data.collection import Collection, read_documents
from mongotorch.datalayer.reprs import datalayer_html, job_list
from mongotorch.datalayer.versions import Versions
from mongotorch.errors import ParameterError
from mongotorch.jobs import Job, RunMetrics
from mongotorch.mongo.connection import Connection, open_address
from mongotorch.query import Query, collection_name
from mongotorch.schedule import Firing, Schedule
from mongotorch.services.composition import Services
from mongotorch.services.overview import Overview
from mongotorch.services.schedules.scheduler import Scheduler
from mongotorch.services.training.job_runner import JobRunner
from mongotorch.services.training.profile import checked, explained, stream_spec, summary_of
from mongotorch.settings import Settings, read_settings
from mongotorch.split import Fold, Split
from mongotorch.store import Collected, RunLog, Verified
from mongotorch.train import Dataset, Metric, ModelSummary, TorchModel, TorchTrainer, Validation

C = TypeVar("C", bound=Component)


@final
class Datalayer(Versions):
    """One open database; a context manager that closes it. `Datalayer.connect` makes one."""

    __mongotorch_unpicklable__: ClassVar[bool] = True

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self.settings = settings
        self._connection = connection
        self._services = Services(connection, settings)

    @classmethod
    def connect(cls, uri: str | None = None, **settings: Any) -> Self:
        """Open a database.

        Args:
            uri: `mongodb://…`, `mongodb+srv://…`, `mongomock://NAME` or `embedded:PATH`; None is the setting
                `uri` (`MONGOTORCH_URI`) or `uri_file`, else the embedded server over `embedded_path`.
            settings: See `Settings`; they override the environment.

        Raises:
            SettingError: The URI or a setting cannot be used.
            ServerUnavailableError: No server answers there.
            EmbeddedServerError: The embedded server is missing here, or does not start.
        """
        chosen = read_settings(**settings, **({} if uri is None else {"uri": uri}))
        connection = open_address(chosen.address(), chosen)
        try:
            return cls(connection, chosen)
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        """Close the connection. A second call does nothing."""
        self._connection.close()

    @property
    def uri(self) -> str:
        """The address with the database in it; it may hold a password."""
        return self._connection.uri

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._connection!r})"

    def _repr_html_(self) -> str:
        return datalayer_html(self.uri, self.overview)

    def __reduce__(self) -> tuple[Any, ...]:
        raise ParameterError("a Datalayer cannot be pickled; pass `db.uri`, and connect in the other process")

    # Collections and queries

    def __getitem__(self, name: str) -> Collection:
        raw = self._connection.database[collection_name(name)]
        return Collection(raw, valid_fraction=self.settings.valid_fraction)

    @arguments_checked
    def execute(self, query: Query) -> Iterator[dict[str, Any]]:
        """The documents of a query, read lazily, stored arrays as tensors.

        Raises:
            QueryError: The server refuses the query.
            ServerUnavailableError: The server cannot be read.
        """
        return read_documents(self._connection.database, query)

    # Streams

    @arguments_checked
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
        split: Split | float | None = None,
        **options: Any,
    ) -> Stream:
        """The training stream alone, for a training loop of your own.

        Args:
            query: The documents.
            key: The fields of a sample, as in `TorchTrainer`.
            batch_size: Documents of a batch.
            shuffle: A new order each epoch; else the query's sort, else `_id`.
            seed: The seed of the order.
            shard: `(rank, world)`: disjoint parts with equal numbers of batches.
            fold: `train` or `valid`; None is both.
            split: Which documents each fold has, as in `TorchTrainer`.
            options: `transform`, `signature`, `collate_fn`, `in_memory`, `download`, `data_prefetch` (True unless
                given), `prefetch_size`, `prefetch_factor`, `defaults`, `dtypes`, `on_bad_document`,
                `sample_weight` as in `TorchTrainer`;
                `across_epochs` (False unless given) reads the next epoch while the end of this one is served, as a
                trainer's stream does;
                `drop_last`, `num_workers` and others as in `torch.utils.data.DataLoader`.

        Returns:
            An `IterableDataset` of batches with `state_dict()`, to be closed or used as a context manager.

        Raises:
            ParameterError: An argument cannot be used; `field` names it.
            LoaderOptionError: An option that does not exist.
        """
        spec = stream_spec(
            self.settings,
            query if fold is None else query.fold(fold, split=split),
            options,
            key=key,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            shard=shard,
        )
        return Stream(self._connection.opener, spec, database=self._connection.database)

    @arguments_checked
    def explain(
        self, trainer: TorchTrainer, *, step_seconds: float | None = None, measure: bool = False, steps: int = 50
    ) -> Explanation:
        """What reading a trainer's documents costs, measured on a few ranges before training.

        Args:
            trainer: The trainer; with `measure`, one with a model.
            step_seconds: The duration of one training step, if known.
            measure: Also train a copy of the model for some steps, and say where the time of a step goes.
            steps: How many steps that are; fewer where they take more than 20 seconds together.

        Raises:
            EmptySelectError, FieldMissingError, QueryError, ServerUnavailableError: As training would.
            ParameterError: It is no trainer, or is to be measured and has no model.
        """
        return explained(
            trainer, self._connection, self.settings, step_seconds=step_seconds, measure=measure, steps=steps
        )

    def summary(self, what: TorchModel | TorchTrainer) -> ModelSummary:
        """The layers of a model as a table: classes, shapes, parameters, and what is frozen.

        Args:
            what: A model; or a trainer, whose first batch tells the shapes of the outputs. Nothing is changed.

        Raises:
            MongotorchError: What the first batch of a run would end in.
        """
        return summary_of(what, self._connection, self.settings)

    def check(self, what: Query | TorchTrainer) -> DataCheck:
        """What documents hold: types, gaps and shapes of each field, from a sample; nothing is written.

        Args:
            what: A query; or a trainer, of whose documents only the fields of its key are looked at, and of which
                one batch of each fold and dataset goes through transform, model, objective and metrics. `apply`
                tries the validation batches as well, before the first step.

        Raises:
            EmptySelectError, QueryError, ServerUnavailableError: The documents cannot be read.
            MongotorchError: What a run of the trainer would end in.
        """
        return checked(what, self._connection, self.settings)

    # Runs

    @overload
    def apply(
        self, component: TorchTrainer | TorchModel, *, force: bool = False, priority: int = 0
    ) -> Job[TorchModel]: ...

    @overload
    def apply(self, component: C, *, force: bool = False, priority: int = 0) -> Job[C]: ...

    @arguments_checked
    def apply(self, component: Component, *, force: bool = False, priority: int = 0) -> Job[Any]:
        """Store a component as a new version, and start its run if it has one.

        Args:
            component: A trainer with a model, a model with a trainer, or anything that is only stored.
            force: Run although nothing changed.
            priority: Jobs with a higher number run first, where jobs queue.

        Returns:
            A future; `result()` is the published model, for a component without a run the component.

        Raises:
            ParameterError: A trainer without a model.
            CodecError: A field cannot be stored; nothing was written.
            UnsafeClosureError: A field holds a database client; nothing was written.
            ConflictError: Its uuid belongs to a different component.
        """
        return self._services.applier.apply(component, force=force, priority=priority)

    @arguments_checked
    def job(self, uuid: str) -> Job[Any]:
        """A job by its uuid, or the first characters of it, from any process. Raises: NotFoundError."""
        return self._services.applier.job(uuid)

    @arguments_checked
    def jobs(
        self, *, status: str | None = None, identifier: str | None = None, limit: int = 100
    ) -> list[Job[Any]]:
        """The jobs, newest first.

        Args:
            status: Only those of this status.
            identifier: Only those of the component of this name.
            limit: At most so many.
        """
        found = self._services.jobs.find(status=status, identifier=identifier, limit=limit)
        return job_list([self._services.applier.job(record["_id"]) for record in found], found)

    @arguments_checked
    def metrics(self, what: Job[Any] | Component | str | tuple[Any, ...]) -> RunMetrics:
        """What a run has measured by now: rows of (step, kind, values, time), of training and of validations.

        Args:
            what: A job; the uuid of a job or of a version; a published component; or a version as
                `("model", identifier, version)`, without a number the one that `load` gives.

        Raises:
            NotFoundError: There is none, or no run has published it.
        """
        return self._services.applier.metrics(what)

    @property
    def runner(self) -> JobRunner:
        """Runs queued jobs here; a `Worker` uses it."""
        return self._services.runner

    @property
    def run_log(self) -> RunLog:
        """What happens to runs and aliases; a mirror passes it on."""
        return self._services.run_log

    # Versions; what is done with them besides is in `Versions`

    @overload
    def load(
        self,
        type_id: Literal["model"],
        identifier: str,
        version: int | None = None,
        *,
        alias: str | None = None,
        code: Any = None,
    ) -> TorchModel: ...

    @overload
    def load(
        self,
        type_id: Literal["trainer"],
        identifier: str,
        version: int | None = None,
        *,
        alias: str | None = None,
    ) -> TorchTrainer: ...

    @overload
    def load(
        self,
        type_id: Literal["metric"],
        identifier: str,
        version: int | None = None,
        *,
        alias: str | None = None,
    ) -> Metric: ...

    @overload
    def load(
        self,
        type_id: Literal["validation"],
        identifier: str,
        version: int | None = None,
        *,
        alias: str | None = None,
    ) -> Validation: ...

    @overload
    def load(
        self,
        type_id: Literal["dataset"],
        identifier: str,
        version: int | None = None,
        *,
        alias: str | None = None,
    ) -> Dataset: ...

    @overload
    def load(
        self,
        type_id: Literal["schedule"],
        identifier: str,
        version: int | None = None,
        *,
        alias: str | None = None,
    ) -> Schedule: ...

    @overload
    def load(
        self,
        type_id: str | None = None,
        identifier: str | None = None,
        version: int | None = None,
        *,
        uuid: str | None = None,
        alias: str | None = None,
        code: Any = None,
    ) -> Any: ...

    @arguments_checked
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
        """Load a stored component, exactly as it was stored.

        Args:
            type_id: `model`, `trainer`, `metric`, `validation`, `dataset`, `schedule`.
            identifier: Its name.
            version: Its version; None is the one that the alias names.
            uuid: Instead of all these: exactly that version.
            alias: The alias; None is `live`. If `live` names none: the newest version that a run published and no
                gate refused, or where there is none the newest of all that no gate refused.
            code: A module of the stored structure: its weights are filled in, and nothing that the database
                holds is unpickled, imported or executed.

        Raises:
            NotFoundError: There is none, or no such alias.
            ParameterError: Neither a uuid nor a kind and a name; an alias with a version or uuid.
            PythonVersionError: It holds bytecode of another Python minor version; nothing was unpickled.
            IntegrityError: A blob is not what was stored.
            TrustError: A signature does not hold.
        """
        catalog = self._services.catalog
        found = catalog.find(type_id, identifier, version, uuid=uuid, alias=alias)
        return catalog.load(found) if code is None else catalog.load_into(found, code)

    # Schedules

    def schedules(self) -> list[dict[str, Any]]:
        """Every schedule's runtime document, by name.

        Its fields for people: `_id`, `paused`, `firings`, `next_at`, `state` (the counts), `last` (the newest
        firing), `outcome` (of the newest run that has ended), `problem`.
        """
        return self._services.register.all()

    @arguments_checked
    def pause(self, identifier: str) -> None:
        """Stop a schedule from firing by itself; its documents are counted meanwhile. Raises: NotFoundError."""
        self._services.register.pause(identifier, paused=True)

    @arguments_checked
    def resume(self, identifier: str) -> None:
        """Let a paused schedule fire again. Raises: NotFoundError."""
        self._services.register.pause(identifier, paused=False)

    @arguments_checked
    def fire(self, identifier: str, *, why: str = "by hand") -> Job[Any]:
        """Fire a schedule now, paused or not; a worker runs the job.

        Args:
            identifier: The schedule.
            why: The reason, for the job.

        Returns:
            The job; `result()` is the published model, live or not.

        Raises:
            NotFoundError: There is no such schedule.
            ConflictError: Other processes write the schedule again and again.
        """
        return self.job(self._services.register.fire_now(identifier, reason=why))

    @arguments_checked
    def preview(self, schedule: Schedule, *, since: datetime, until: datetime | None = None) -> list[Firing]:
        """When a schedule, applied or not, would have fired.

        A document counts at the time in its ObjectId; documents with other `_id`s do not count.

        Args:
            schedule: The schedule.
            since: The start; aware, or naive UTC.
            until: The end; None is now.

        Raises:
            ParameterError: Its trigger looks at measurements, which the past does not have.
        """
        return self._services.register.preview(schedule, since=since, until=until)

    @property
    def scheduler(self) -> Scheduler:
        """Watches and fires schedules; a `Worker` runs it."""
        return self._services.scheduler

    # Maintenance

    @property
    def overview(self) -> Overview:
        """What the dashboard shows."""
        return self._services.overview

    @arguments_checked
    def gc(self, dry_run: bool = False, *, grace_s: float = 3600.0) -> Collected:
        """Remove what no component, checkpoint or running publication refers to, and jobs that are too old.

        Args:
            dry_run: Only report what would be removed.
            grace_s: Seconds for which it must have been unreferenced; 0 only while no other process writes.
        """
        return self._services.collect(dry_run=dry_run, grace_s=grace_s)

    def verify(self, *, repair: str | Path | None = None) -> Verified:
        """Read and hash every blob, check every component and alias; problems are reported, not raised.

        Args:
            repair: A folder: a blob that is damaged or missing, and whose bytes a file in it has, under whatever
                name, is put back. None changes nothing.
        """
        return self._services.verifier.verify(copies=None if repair is None else Path(repair))

    def resign(self) -> int:
        """Sign with the first key what another accepted key has signed, so that the other can be dropped.

        Returns:
            How many records were signed again; what no accepted key has signed stays as it is.

        Raises:
            SettingError: There is no key that can sign.
            TrustError: A record was changed since it was signed.
        """
        return self._services.verifier.resign()
