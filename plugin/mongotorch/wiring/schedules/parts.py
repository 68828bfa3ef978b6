"""The parts that schedules need, made and wired once.

Always: they hold nothing but the connection, as all parts; the scheduler does nothing until it is run.
"""

from __future__ import annotations

from typing import final

from mongotorch.settings import Settings
from mongotorch.store import Aliases, Artifacts, Components, Connection, Jobs, Schedules
from mongotorch.wiring.load import Loader
from mongotorch.wiring.performing import worker_name
from mongotorch.wiring.schedules.firings import Firings
from mongotorch.wiring.schedules.judging import Judge
from mongotorch.wiring.schedules.measuring import Gauges
from mongotorch.wiring.schedules.news import News
from mongotorch.wiring.schedules.registering import Register
from mongotorch.wiring.schedules.retraining import Retraining
from mongotorch.wiring.schedules.scheduling import Scheduler
from mongotorch.wiring.serving import Promoter
from mongotorch.wiring.training import Training


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
