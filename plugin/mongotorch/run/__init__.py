"""Who trains, when and where: the engine port and its engines, the worker, and the future that `apply` returns.

Nothing here knows the database, torch, or a component: a job is an address, and what is done for it is a
function that the wiring hands in.
"""

from __future__ import annotations

from mongotorch.run.engine import Engine, LocalEngine, QueueEngine, engine_named
from mongotorch.run.job import FINAL_STATUSES, Job, JobRecords
from mongotorch.run.pool import run_pool
from mongotorch.run.progress import ProgressBar
from mongotorch.run.worker import Employer, Shift, Worker

__all__ = [
    "FINAL_STATUSES",
    "Employer",
    "Engine",
    "Job",
    "JobRecords",
    "LocalEngine",
    "ProgressBar",
    "QueueEngine",
    "Shift",
    "Worker",
    "engine_named",
    "run_pool",
]
