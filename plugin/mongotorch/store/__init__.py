"""What MongoDB keeps: blobs by content, component documents by version, behind a connection by address."""

from mongotorch.store.aliases import LIVE, Aliases, Move, following
from mongotorch.store.blobs import Artifacts
from mongotorch.store.checkpoints import Checkpoints
from mongotorch.store.components import Components
from mongotorch.store.jobs import Jobs
from mongotorch.store.maintenance import Checker, Collected, Garbage, Verified
from mongotorch.store.metrics import Points
from mongotorch.store.schedules import Schedules
from mongotorch.store.signing import Trust, trust_of

__all__ = [
    "LIVE",
    "Aliases",
    "Artifacts",
    "Checker",
    "Checkpoints",
    "Collected",
    "Components",
    "Garbage",
    "Jobs",
    "Move",
    "Points",
    "Schedules",
    "Trust",
    "Verified",
    "following",
    "trust_of",
]
