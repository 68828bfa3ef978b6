"""Jobs: the handle, the engines that take them, and the worker process."""

from mongotorch.jobs.engine import Engine, LocalEngine, QueueEngine, engine_named
from mongotorch.jobs.job import Job, JobRecords
from mongotorch.jobs.worker import Clockwork, Employer, Shift, Worker, run_pool

__all__ = [
    "Clockwork",
    "Employer",
    "Engine",
    "Job",
    "JobRecords",
    "LocalEngine",
    "QueueEngine",
    "Shift",
    "Worker",
    "engine_named",
    "run_pool",
]
