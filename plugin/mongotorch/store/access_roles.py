"""The three roles that people and processes need, as documents for MongoDB's `createRole`: no more than is used.

- `reader` loads and lists: it reads the whole database and may watch jobs.
- `worker` fires schedules and runs jobs: it adds versions, blobs and points, promotes, and cannot change or remove
  a version, or write to the data it trains on (so documents need their folds from somebody else).
- `trainer` does everything within its database.

Always: a role is for one database and says nothing of any other.
"""

from __future__ import annotations

from typing import Any, Final

from mongotorch.store.aliases import COLLECTION as ALIASES
from mongotorch.store.blobs import BUCKET
from mongotorch.store.checkpoints import COLLECTION as CHECKPOINTS
from mongotorch.store.components import COLLECTION as COMPONENTS
from mongotorch.store.jobs import COLLECTION as JOBS
from mongotorch.store.metrics import COLLECTION as POINTS
from mongotorch.store.schedules import COLLECTION as SCHEDULES

_READ: Final = ["find", "listCollections", "listIndexes", "collStats", "dbStats", "changeStream"]
_WORKER: Final = {
    ALIASES: ["insert"],
    COMPONENTS: ["insert"],
    f"{BUCKET}.files": ["insert", "update"],
    f"{BUCKET}.chunks": ["insert", "remove"],  # of an upload that lost the race against the same bytes
    JOBS: ["insert", "update"],
    POINTS: ["insert", "update"],
    CHECKPOINTS: ["insert", "update", "remove"],
    SCHEDULES: ["insert", "update", "remove"],  # of the lease that says who looks
}
ROLES: Final = ("reader", "worker", "trainer")


def role_document(role: str, database: str) -> dict[str, Any]:
    """The command that makes a role, to be run on the database `admin`.

    Args:
        role: `reader`, `worker` or `trainer`.
        database: The database that it is for.

    Returns:
        `{"createRole": "mongotorch-ROLE-DATABASE", …}`.
    """
    whole = {"db": database, "collection": ""}
    privileges: list[dict[str, Any]] = [{"resource": whole, "actions": _READ}]
    inherited: list[dict[str, str]] = []
    if role == "worker":
        privileges += [
            {"resource": {"db": database, "collection": name}, "actions": actions}
            for name, actions in _WORKER.items()
        ]
    elif role == "trainer":
        inherited = [{"role": "readWrite", "db": database}]
    return {"createRole": f"mongotorch-{role}-{database}", "privileges": privileges, "roles": inherited}
