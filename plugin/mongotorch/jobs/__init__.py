"""Jobs: the handle, what handlers get, and the engines that run them."""

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

__all__ = [
    "Engine",
    "Handler",
    "Job",
    "JobRecords",
    "Lease",
    "LocalEngine",
    "QueueEngine",
    "engine_named",
    "environment",
    "log_job",
    "worker_name",
]
