"""Gives the three database roles that people and processes need, as `createRole` commands with least privileges.

- `reader` loads and lists: it reads the whole database and watches it.
- `worker` runs jobs and fires schedules: it adds versions, blobs and metrics, and promotes. It can neither change
  nor remove a version or a blob, nor write to the data it trains on.
- `trainer` does everything within its database.
"""

from __future__ import annotations

from typing import Any, Final

from mongotorch.store.aliases import COLLECTION as ALIASES
from mongotorch.store.blobs import BUCKET, USES
from mongotorch.store.checkpoints import COLLECTION as CHECKPOINTS
from mongotorch.store.components import COLLECTION as COMPONENTS
from mongotorch.store.jobs import COLLECTION as JOBS
from mongotorch.store.metrics import COLLECTION as METRICS
from mongotorch.store.run_events import COLLECTION as MIRRORS
from mongotorch.store.schedules import COLLECTION as SCHEDULES

_READ: Final = ["find", "listCollections", "listIndexes", "collStats", "dbStats", "changeStream"]
_WORKER: Final = {
    ALIASES: ["insert"],
    COMPONENTS: ["insert"],
    f"{BUCKET}.files": ["insert"],
    f"{BUCKET}.chunks": ["insert"],
    USES: ["insert"],
    JOBS: ["insert", "update"],
    METRICS: ["insert", "update", "remove"],  # a long run keeps every second entry, then every fourth, and so on
    MIRRORS: ["insert", "update"],
    CHECKPOINTS: ["insert", "update", "remove"],
    SCHEDULES: ["insert", "update", "remove"],  # the leader's lease is removed
}
ROLES: Final = ("reader", "worker", "trainer")


def role_document(role: str, database: str) -> dict[str, Any]:
    """The command that creates a role, to be run on the database `admin`.

    Args:
        role: `reader`, `worker` or `trainer`.
        database: The one database that the role is for.

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
