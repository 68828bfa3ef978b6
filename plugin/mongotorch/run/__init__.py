"""Who trains, when and where: engines, the worker, the future that `apply` returns, and schedules.

Always: nothing here knows the database or torch: a job is an address, and what is done for it is a function that
the wiring hands in; a `Schedule` is a component, and when it is due and whether its model goes live are pure
functions of what somebody else has observed.
"""

from __future__ import annotations

from mongotorch.run.engine import Engine, LocalEngine, QueueEngine, engine_named
from mongotorch.run.gates import Always, Better, Gate, Never, gate_of
from mongotorch.run.job import FINAL_STATUSES, Job, JobRecords
from mongotorch.run.pool import run_pool
from mongotorch.run.preview import Firing, preview
from mongotorch.run.progress import ProgressBar
from mongotorch.run.schedule import Schedule
from mongotorch.run.scores import Scores, Verdict
from mongotorch.run.triggers import (
    AllOf,
    AnyOf,
    Changed,
    Cron,
    Decision,
    Every,
    MetricAbove,
    MetricBelow,
    NewDocuments,
    State,
    Trigger,
)
from mongotorch.run.worker import Clockwork, Employer, Shift, Worker

__all__ = [
    "FINAL_STATUSES",
    "AllOf",
    "Always",
    "AnyOf",
    "Better",
    "Changed",
    "Clockwork",
    "Cron",
    "Decision",
    "Employer",
    "Engine",
    "Every",
    "Firing",
    "Gate",
    "Job",
    "JobRecords",
    "LocalEngine",
    "MetricAbove",
    "MetricBelow",
    "Never",
    "NewDocuments",
    "ProgressBar",
    "QueueEngine",
    "Schedule",
    "Scores",
    "Shift",
    "State",
    "Trigger",
    "Verdict",
    "Worker",
    "engine_named",
    "gate_of",
    "preview",
    "run_pool",
]
