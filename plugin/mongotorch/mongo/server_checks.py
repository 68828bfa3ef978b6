"""Looks at the server of a connection, and says what would stop or spoil a run there.

Guarantees: nothing is written; what may not be read is said, and does not stop the other checks.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, Literal

from pymongo.errors import PyMongoError

from mongotorch.mongo.connection import OLDEST_SERVER, OLDEST_WIRE_VERSION, Connection
from mongotorch.mongo.driver_errors import redact
from mongotorch.mongo.server_binary import advisories

State = Literal["ok", "warning", "problem", "unknown"]
_MOST_SKEW_S: Final = 2.0
_LEAST_FREE_BYTES: Final = 2 * 2**30
_NEEDED: Final = ("find", "insert", "update", "createIndex", "changeStream")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What it is.
        state: `ok`, `warning` (runs work, something is missing), `problem`, or `unknown` where it may not be read.
        text: What was found, and what to do about it.
    """

    name: str
    state: State
    text: str


def check_server(connection: Connection) -> list[Check]:
    """Look at a server: version, replica set, permissions, clock, disk, indexes.

    Args:
        connection: An open one.
    """
    if connection.kind == "mongomock":
        return [Check(name="server", state="warning", text="mongomock: data lives in the memory of this process")]
    checks: tuple[tuple[str, Callable[[Connection], Check]], ...] = (
        ("version", _version),
        ("replica set", _replica_set),
        ("permissions", _permissions),
        ("clock", _clock),
        ("disk", _disk),
        ("indexes", _indexes),
    )
    found = []
    for name, check in checks:
        try:
            found.append(check(connection))
        except (PyMongoError, KeyError, TypeError, ValueError) as error:
            text = f"could not be read: {redact(str(error)).splitlines()[0][:200]}"
            found.append(Check(name=name, state="unknown", text=text))
    return found


def _version(connection: Connection) -> Check:
    version = connection.client.server_info()["version"]
    wire = connection.client.admin.command("hello")["maxWireVersion"]
    if wire < OLDEST_WIRE_VERSION:
        text = f"MongoDB {version} has no snapshot reads; use {OLDEST_SERVER} or newer"
        return Check(name="version", state="problem", text=text)
    major, minor, patch = (int(part) for part in re.findall(r"\d+", version)[:3])
    known = advisories((major, minor, patch)) if _speaks_zlib(connection) else ()
    if known:
        return Check(name="version", state="warning", text=" ".join(known))
    return Check(name="version", state="ok", text=f"MongoDB {version}")


def _speaks_zlib(connection: Connection) -> bool:
    answer = connection.client.admin.command("hello", compression=["zlib"])
    return "zlib" in answer.get("compression", [])


def _replica_set(connection: Connection) -> Check:
    hello = connection.client.admin.command("hello")
    if hello.get("msg") == "isdbgrid":
        return Check(name="replica set", state="ok", text="a sharded cluster")
    if "setName" not in hello:
        text = (
            "a single server: no transactions and no change streams, so publications cannot be fenced and "
            "schedules look for documents by polling; start it with --replSet and run rs.initiate()"
        )
        return Check(name="replica set", state="warning", text=text)
    members = len(hello.get("hosts", []))
    return Check(name="replica set", state="ok", text=f"{hello['setName']}, {members} member(s) with data")


def _permissions(connection: Connection) -> Check:
    status = connection.client.admin.command("connectionStatus", showPrivileges=True)["authInfo"]
    if not status["authenticatedUsers"]:
        text = "nobody is authenticated: whoever reaches the server may do everything"
        return Check(name="permissions", state="warning", text=text)
    user = status["authenticatedUsers"][0]
    actions = {
        action
        for privilege in status["authenticatedUserPrivileges"]
        if _covers(privilege["resource"], connection.database.name)
        for action in privilege["actions"]
    }
    missing = [] if "anyAction" in actions else [action for action in _NEEDED if action not in actions]
    text = f"{user['user']}@{user['db']}"
    if missing:
        return Check(name="permissions", state="warning", text=f"{text} may not {', '.join(missing)}")
    return Check(name="permissions", state="ok", text=text)


def _covers(resource: Mapping[str, Any], database: str) -> bool:
    return bool(resource.get("anyResource")) or resource.get("db") in (database, "")


def _clock(connection: Connection) -> Check:
    before, begun = datetime.now(UTC), time.monotonic()
    answer = connection.client.admin.command("hello")["localTime"]
    took_s = time.monotonic() - begun
    there = answer if answer.tzinfo else answer.replace(tzinfo=UTC)
    skew_s = abs((there - before).total_seconds() - took_s / 2)
    text = f"{skew_s:.1f} s from the server's"
    if skew_s > _MOST_SKEW_S + took_s:
        return Check(name="clock", state="warning", text=f"{text}; leases are the server's, logs would mislead")
    return Check(name="clock", state="ok", text=text)


def _disk(connection: Connection) -> Check:
    stats = connection.database.command("dbStats")
    used, free = stats["storageSize"] + stats["indexSize"], stats["fsTotalSize"] - stats["fsUsedSize"]
    if not stats["fsTotalSize"]:
        return Check(name="disk", state="ok", text="not told for a database without collections")
    text = f"{used / 2**20:,.0f} MB used by this database, {free / 2**30:,.1f} GB free"
    return Check(name="disk", state="ok" if free > _LEAST_FREE_BYTES else "problem", text=text)


def _indexes(connection: Connection) -> Check:
    names = [
        name
        for name in connection.database.list_collection_names(authorizedCollections=True)
        if name.startswith("mt.")
    ]
    if not names:
        return Check(name="indexes", state="ok", text="nothing is stored yet")
    bare = [name for name in sorted(names) if name in _INDEXED and len(_indexes_of(connection, name)) < 2]
    if bare:
        text = f"{', '.join(bare)} lack indexes; open the database once as a user who may create them"
        return Check(name="indexes", state="problem", text=text)
    return Check(name="indexes", state="ok", text=f"of {len(names)} collections")


_INDEXED: Final = ("mt.artifacts.files", "mt.artifacts.chunks", "mt.components", "mt.jobs", "mt.metrics")


def _indexes_of(connection: Connection, name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = connection.database[name].index_information()
    return found
