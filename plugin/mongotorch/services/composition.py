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
from mongotorch.services.schedules.firing import Firings, Gauges
from mongotorch.services.schedules.judging import Judge
from mongotorch.services.schedules.register import Register
from mongotorch.services.schedules.retraining import News, Retraining
from mongotorch.services.schedules.scheduler import Scheduler
from mongotorch.services.training.checkpoints import Checkpointing
from mongotorch.services.training.heartbeat import Heart
from mongotorch.services.training.job_runner import Performer, Work, worker_name
from mongotorch.services.training.recipe import Facts
from mongotorch.services.training.training_run import Training
from mongotorch.services.versions.catalog import Loader, Publisher
from mongotorch.services.versions.promotion import Promoter, Remover
from mongotorch.settings import Settings
from mongotorch.store import (
    Aliases,
    Artifacts,
    Checker,
    Checkpoints,
    Components,
    Jobs,
    Points,
    Schedules,
    trust_of,
)


@final
class ScheduleParts:
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
        artifacts: Artifacts,
        aliases: Aliases,
        jobs: Jobs,
        loader: Loader,
        promoter: Promoter,
        training: Training,
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
            news=News(database, components, artifacts),
            told=self.register.told,
        )
        gauges = Gauges(connection=connection, settings=settings, firings=firings, loader=loader, judge=judge)
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

    def __init__(self, usual: Work, special: Mapping[str, Work]) -> None:
        self._usual, self._special = usual, special

    def run(self, job: Mapping[str, Any], heart: Heart) -> str:
        """See `Work.run`."""
        return self._special.get(job["type_id"], self._usual).run(job, heart)


@final
class Parts:
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
        self.components, self.artifacts = Components(database, trust), Artifacts(database)
        self.jobs, self.points = Jobs(database), Points(database)
        self.checkpoints = Checkpoints(database, trust)
        self.aliases, self.checker = Aliases(database, trust), Checker(database, trust)
        for part in (self.components, self.artifacts, self.jobs, self.points, self.checkpoints, self.aliases):
            part.ensure_indexes()
        self.loader = Loader(self.components, self.artifacts, self.aliases, codecs)
        self.publisher = Publisher(self.components, self.artifacts, codecs)
        self.promoter = Promoter(self.components, self.aliases)
        self.remover = Remover(self.components, self.artifacts, self.promoter)
        checkpointing = Checkpointing(self.checkpoints, self.artifacts, codecs)
        training = self._training(checkpointing)
        standing = ScheduleParts(
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
        self.performer = Performer(self.jobs, works, settings)
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

    def _training(self, checkpointing: Checkpointing) -> Training:
        return Training(
            connection=self._connection,
            settings=self._settings,
            components=self.components,
            points=self.points,
            loader=self.loader,
            publisher=self.publisher,
            checkpointing=checkpointing,
            jobs=self.jobs,
            facts=Facts(self._connection, self._settings),
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
            facts=Facts(self._connection, self._settings),
        )
