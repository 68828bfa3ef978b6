"""What MongoDB keeps: blobs by content, component documents by version, behind a connection by address."""

from __future__ import annotations

from mongotorch.store.aliases import LIVE, Aliases, Move
from mongotorch.store.artifacts import Artifacts
from mongotorch.store.checkpoints import Checkpoints
from mongotorch.store.components import Components
from mongotorch.store.connect import Connection, Opener, open_address
from mongotorch.store.embedded import EmbeddedServer
from mongotorch.store.failures import driver_errors
from mongotorch.store.following import following
from mongotorch.store.garbage import Collected, Garbage
from mongotorch.store.jobs import Jobs
from mongotorch.store.keys import trust_of
from mongotorch.store.points import Points
from mongotorch.store.redaction import redact
from mongotorch.store.schedules import Schedules
from mongotorch.store.trust import Trust
from mongotorch.store.verifying import Checker, Verified
from mongotorch.store.watch import Baseline, Change, HistoryLostError, Watch, baseline, counted

__all__ = [
    "LIVE",
    "Aliases",
    "Artifacts",
    "Baseline",
    "Change",
    "Checker",
    "Checkpoints",
    "Collected",
    "Components",
    "Connection",
    "EmbeddedServer",
    "Garbage",
    "HistoryLostError",
    "Jobs",
    "Move",
    "Opener",
    "Points",
    "Schedules",
    "Trust",
    "Verified",
    "Watch",
    "baseline",
    "counted",
    "driver_errors",
    "following",
    "open_address",
    "redact",
    "trust_of",
]
