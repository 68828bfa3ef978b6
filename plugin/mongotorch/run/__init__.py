"""Who trains, when and where: the engine port, the local engine, and the future that `apply` returns.

Nothing here knows the database, torch, or a component: a job is an address, and what is done for it is a
function that the wiring hands in.
"""

from __future__ import annotations

from mongotorch.run.engine import Engine, LocalEngine
from mongotorch.run.job import FINAL_STATUSES, Job, JobRecords
from mongotorch.run.progress import ProgressBar

__all__ = ["FINAL_STATUSES", "Engine", "Job", "JobRecords", "LocalEngine", "ProgressBar"]
