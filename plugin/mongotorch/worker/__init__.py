"""Workers: they run the jobs of the queue and fire schedules, in the calling process or in child processes."""

from mongotorch.worker.loop import Worker
from mongotorch.worker.supervisor import Supervisor, Tally

__all__ = ["Supervisor", "Tally", "Worker"]
