"""The parts of one open database, made and wired once.

Always: making them makes the indexes that their promises rest on; they hold nothing but the connection.

The parts that schedules need, made and wired once.

Always: they hold nothing but the connection, as all parts; the scheduler does nothing until it is run.

Which work a job is: by the kind of the component that it names.

Always: a kind that has no work of its own is trained.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, final

from mongotorch.codecs import Codecs
from mongotorch.jobs import engine_named
from mongotorch.mongo.connection import Connection
from mongotorch.schedule import Schedule
from mongotorch.services.apply import Applier
from mongotorch.services.lineage import Comparer, Reproducer
from mongotorch.services.schedules.firing import Firings, LiveMetrics
from mongotorch.services.schedules.judging import Judge
from mongotorch.services.schedules.register import Register
from mongotorch.services.schedules.retraining import NewDocumentFinder, Retraining
from mongotorch.services.schedules.scheduler import Scheduler
from mongotorch.services.training.checkpoints import RunCheckpoints
from mongotorch.services.training.heartbeat import Heartbeat
from mongotorch.services.training.job_runner import JobHandler, JobRunner, worker_name
from mongotorch.services.training.recipe import DataProvenance
from mongotorch.services.training.training_run import TrainingRun
from mongotorch.services.versions.catalog import Loader, Publisher
from mongotorch.services.versions.promotion import Promoter, Remover
from mongotorch.settings import Settings
from mongotorch.store import (
    Aliases,
    BlobStore,
    Checkpoints,
    Components,
    Jobs,
    MetricLog,
    Schedules,
    Verifier,
    trust_of,
)


@final
class ScheduleServices:
    """What watches, fires, judges and remembers.

    Args:
        connection: The open database, which stays the datalayer's.
        settings: Of the datalayer.
        components: The component documents.
        artifacts: The blobs.
        aliases: The moves of the aliases.
        jobs: The job documents.
        loader: Loads components.
        promoter: Moves aliases.
        training: Trains and publishes.
    """

    def __init__(
        self,
        *,
        connection: Connection,
        settings: Settings,
        components: Components,
        artifacts: BlobStore,
        aliases: Aliases,
        jobs: Jobs,
        loader: Loader,
        promoter: Promoter,
        training: TrainingRun,
    ) -> None:
        database = connection.database
        schedules = Schedules(database)
        schedules.ensure_indexes()
        firings = Firings(schedules, jobs, loader)
        judge = Judge(
            connection=connection,
            settings=settings,
            aliases=aliases,
            loader=loader,
            promoter=promoter,
        )
        self.register = Register(
            database=database, schedules=schedules, firings=firings, loader=loader, judge=judge
        )
        self.retraining = Retraining(
            connection=connection,
            settings=settings,
            components=components,
            loader=loader,
            training=training,
            judge=judge,
            news=NewDocumentFinder(database, components, artifacts),
            told=self.register.told,
        )
        gauges = LiveMetrics(connection=connection, settings=settings, firings=firings, loader=loader, judge=judge)
        self.scheduler = Scheduler(
            database=database,
            schedules=schedules,
            firings=firings,
            measure=gauges.measure,
            lease_s=settings.lease_s,
            name=worker_name(),
        )


@final
class Works:
    """Work by kind.

    Args:
        usual: What is done for a kind that is not named.
        special: What is done for the others.
    """

    def __init__(self, usual: JobHandler, special: Mapping[str, JobHandler]) -> None:
        self._usual, self._special = usual, special

    def run(self, job: Mapping[str, Any], heart: Heartbeat) -> str:
        """See `JobHandler.run`."""
        return self._special.get(job["type_id"], self._usual).run(job, heart)


@final
class Services:
    """What a datalayer hands out.

    Args:
        connection: The open database, which stays the datalayer's.
        settings: Of the datalayer.
    """

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self._connection, self._settings = connection, settings
        database, codecs = connection.database, Codecs.default()
        secret = settings.signing_key.get_secret_value() if settings.signing_key is not None else None
        trust = trust_of(key=secret, key_file=settings.signing_key_file, policy=settings.trust)
        self.components, self.artifacts = Components(database, trust), BlobStore(database)
        self.jobs, self.points = Jobs(database), MetricLog(database)
        self.checkpoints = Checkpoints(database, trust)
        self.aliases, self.checker = Aliases(database, trust), Verifier(database, trust)
        for part in (self.components, self.artifacts, self.jobs, self.points, self.checkpoints, self.aliases):
            part.ensure_indexes()
        self.loader = Loader(self.components, self.artifacts, self.aliases, codecs)
        self.publisher = Publisher(self.components, self.artifacts, codecs)
        self.promoter = Promoter(self.components, self.aliases)
        self.remover = Remover(self.components, self.artifacts, self.promoter)
        checkpointing = RunCheckpoints(self.checkpoints, self.artifacts, codecs)
        training = self._training(checkpointing)
        standing = ScheduleServices(
            connection=connection,
            settings=settings,
            components=self.components,
            artifacts=self.artifacts,
            aliases=self.aliases,
            jobs=self.jobs,
            loader=self.loader,
            promoter=self.promoter,
            training=training,
        )
        self.register, self.scheduler = standing.register, standing.scheduler
        works = Works(training, {Schedule.type_id: standing.retraining})
        self.performer = JobRunner(self.jobs, works, settings)
        self.applier = Applier(
            components=self.components,
            jobs=self.jobs,
            publisher=self.publisher,
            loader=self.loader,
            engine=engine_named(settings.compute),
            perform=self.performer.perform,
            forget=checkpointing.drop,
            register=self.register,
        )

    def _training(self, checkpointing: RunCheckpoints) -> TrainingRun:
        return TrainingRun(
            connection=self._connection,
            settings=self._settings,
            components=self.components,
            points=self.points,
            loader=self.loader,
            publisher=self.publisher,
            checkpointing=checkpointing,
            jobs=self.jobs,
            facts=DataProvenance(self._connection, self._settings),
        )

    @functools.cached_property
    def comparer(self) -> Comparer:
        """Compares versions."""
        return Comparer(self.components, self.artifacts)

    @functools.cached_property
    def reproducer(self) -> Reproducer:
        """Trains versions again."""
        return Reproducer(
            connection=self._connection,
            settings=self._settings,
            components=self.components,
            artifacts=self.artifacts,
            loader=self.loader,
            facts=DataProvenance(self._connection, self._settings),
        )
