"""Jobs: the handle, what handlers get, what a run measured, and the engines that run them."""

from mongotorch.jobs.engine import (
    Engine,
    LocalEngine,
    QueueEngine,
    engine_named,
    environment,
    log_job,
    worker_name,
)
from mongotorch.jobs.job import Handler, Job, JobRecords, Lease
from mongotorch.jobs.run_metrics import MetricRow, RunMetrics

__all__ = [
    "Engine",
    "Handler",
    "Job",
    "JobRecords",
    "Lease",
    "LocalEngine",
    "MetricRow",
    "QueueEngine",
    "RunMetrics",
    "engine_named",
    "environment",
    "log_job",
    "worker_name",
]
