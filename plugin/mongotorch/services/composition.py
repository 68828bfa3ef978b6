"""Builds the services of one open database, once.

Guarantees: building them creates the indexes that their guarantees rest on. They hold no state but the connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from mongotorch.jobs import engine_named, worker_name
from mongotorch.mongo.connection import Connection
from mongotorch.schedule import Schedule
from mongotorch.services.apply import Applier
from mongotorch.services.overview import Overview
from mongotorch.services.schedules.register import Register
from mongotorch.services.schedules.retraining import LiveMetrics, Retraining
from mongotorch.services.schedules.scheduler import Scheduler
from mongotorch.services.training.job_runner import JobRunner
from mongotorch.services.training.ranks import RankRunner, Ranks
from mongotorch.services.training.training_run import TrainingRun
from mongotorch.services.versions.bundles import Bundles
from mongotorch.services.versions.catalog import Catalog
from mongotorch.settings import Settings
from mongotorch.store import (
    Checkpoints,
    Collected,
    GarbageCollector,
    Jobs,
    Listing,
    MetricLog,
    MirrorPositions,
    RunLog,
    Schedules,
    Verifier,
    trust_of,
)


@final
class Services:
    """The services of a datalayer.

    Args:
        connection: The open database; the datalayer closes it.
        settings: The datalayer's.

    Attributes:
        catalog: The versions.
        verifier: Checks what is stored.
        bundles: Exports and imports versions.
        overview: What the dashboard shows.
        jobs: The job documents.
        runner: Runs jobs.
        applier: Applies components.
        run_log: What happens to runs and aliases.
        register: The schedules.
        scheduler: Fires schedules.
    """

    def __init__(self, connection: Connection, settings: Settings) -> None:
        database = connection.database
        secret = settings.signing_key.get_secret_value() if settings.signing_key is not None else None
        trust = trust_of(key=secret, key_file=settings.signing_key_file, policy=settings.trust)
        self.catalog, self.jobs = Catalog(database, trust), Jobs(database)
        metric_log, schedules = MetricLog(database), Schedules(database)
        checkpoints = Checkpoints(database, trust)
        for store in (self.catalog, self.jobs, metric_log, checkpoints, schedules):
            store.ensure_indexes()
        self.run_log = RunLog(
            jobs=self.jobs,
            metric_log=metric_log,
            aliases=self.catalog.aliases,
            components=self.catalog.components,
            positions=MirrorPositions(database),
        )
        self.bundles = Bundles(self.catalog, self.jobs, metric_log, trust)
        self.verifier = Verifier(database, trust)
        self.overview = Overview(Listing(database))
        training = TrainingRun(
            connection,
            settings,
            self.catalog,
            jobs=self.jobs,
            metric_log=metric_log,
            checkpoints=checkpoints,
            ranks=Ranks(connection, settings, self.jobs),
        )
        self.register = Register(database, schedules, self.jobs, self.catalog)
        retraining = Retraining(connection, settings, training, record_outcome=self.register.record_outcome)
        self.scheduler = self._make_scheduler(connection, settings, schedules)

        def training_of(job: Mapping[str, Any]) -> Retraining | TrainingRun:
            return retraining if job["type_id"] == Schedule.type_id else training

        self.runner = JobRunner(
            self.jobs,
            settings,
            train=training.run,
            handlers={Schedule.type_id: retraining.run},
            train_rank=RankRunner(self.jobs, training_of=training_of),
        )
        self.applier = Applier(
            self.catalog,
            self.jobs,
            checkpoints,
            metric_log,
            engine=engine_named(settings.compute),
            run=self.runner.run,
            apply_schedule=self.register.apply,
            max_runtime_s=settings.max_runtime_s,
        )
        self._database, self._keep_jobs_days = database, settings.keep_jobs_days

    def _make_scheduler(self, connection: Connection, settings: Settings, schedules: Schedules) -> Scheduler:
        live_metrics = LiveMetrics(
            connection,
            settings,
            load=self.catalog.load_uuid,
            served_model=self.catalog.served_model,
            trigger_of=self.register.trigger_of,
        )
        return Scheduler(
            connection.database,
            schedules,
            look=self.register.look,
            measure=live_metrics.measure,
            settle=self.register.settle,
            lease_s=settings.lease_s,
            name=worker_name(),
        )

    def collect(self, *, dry_run: bool, grace_s: float) -> Collected:
        """Remove what nothing refers to; see `Datalayer.gc`."""
        days = self._keep_jobs_days
        keep_jobs_s = None if days is None else days * 86_400.0
        return GarbageCollector(self._database, grace_s=grace_s, keep_jobs_s=keep_jobs_s).collect(dry_run=dry_run)
