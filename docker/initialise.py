"""Makes the replica set, roles, users and indexes of docker/compose.yaml; what is there already stays.

Environment:
    MONGO_MEMBER: `host:port` of the server, under which the other containers reach it.
    MONGO_DATABASE: The database that the users are for.
    MONGO_SECRETS: The folder with `root_password`, and `NAME_password` for each user, and `trainer_uri`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

from mongotorch import Datalayer
from mongotorch.store.access_roles import ROLES, role_document

NOT_YET_INITIALIZED = 94
DEADLINE_S = 120.0


def initialise(member: str, database: str, secrets: Path) -> None:
    """Do all of it.

    Raises:
        PyMongoError: The server refuses something, or is not there.
        TimeoutError: It is no primary after two minutes.
    """
    root: dict[str, Any] = {
        "username": "root",
        "password": read(secrets / "root_password"),
        "authSource": "admin",
        "directConnection": True,
        "serverSelectionTimeoutMS": 30_000,
    }
    with MongoClient[dict[str, Any]](f"mongodb://{member}", **root) as client:
        make_replica_set(client, member)
        wait_for_primary(client)
        for role in ROLES:
            make_role(client, role_document(role, database))
            make_user(client, role, read(secrets / f"{role}_password"), f"mongotorch-{role}-{database}")
    # A worker may not create indexes: the first connection of a trainer does.
    with Datalayer.connect(read(secrets / "trainer_uri")):
        pass


def read(path: Path) -> str:
    """The one line of a secret."""
    return path.read_text(encoding="utf-8").strip()


def make_replica_set(client: MongoClient[dict[str, Any]], member: str) -> None:
    """Initiate the replica set, if it is new."""
    try:
        client.admin.command("replSetGetStatus")
    except OperationFailure as error:
        if error.code != NOT_YET_INITIALIZED:
            raise
        client.admin.command("replSetInitiate", {"_id": "rs0", "members": [{"_id": 0, "host": member}]})


def wait_for_primary(client: MongoClient[dict[str, Any]]) -> None:
    """Return when the server can be written to."""
    deadline = time.monotonic() + DEADLINE_S
    while not client.admin.command("hello")["isWritablePrimary"]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the server is no primary after {DEADLINE_S:.0f} s")
        time.sleep(0.2)


def make_role(client: MongoClient[dict[str, Any]], command: dict[str, Any]) -> None:
    """Create a role, or give an older one the privileges of this release."""
    name, rights = command["createRole"], {key: command[key] for key in ("privileges", "roles")}
    exists = client.admin.command("rolesInfo", name)["roles"]
    client.admin.command("updateRole" if exists else "createRole", name, **rights)


def make_user(client: MongoClient[dict[str, Any]], name: str, password: str, role: str) -> None:
    """Create a user with one role, or give it this password and this role alone."""
    exists = client.admin.command("usersInfo", name)["users"]
    client.admin.command("updateUser" if exists else "createUser", name, pwd=password, roles=[role])


if __name__ == "__main__":
    environment = os.environ
    try:
        initialise(environment["MONGO_MEMBER"], environment["MONGO_DATABASE"], Path(environment["MONGO_SECRETS"]))
    except (PyMongoError, OSError, KeyError) as error:
        sys.exit(f"initialise: {error}")
    sys.stdout.write("initialised\n")
