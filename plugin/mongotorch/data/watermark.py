"""When it is in the database: the moment up to which a run can have seen its documents.

Always: on a replica set it is a cluster time, which orders all writes; elsewhere it is the server's own clock.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from bson import Timestamp

from mongotorch.data.patience import Patience


def watermark(database: Any, *, read_deadline_s: float = 60.0) -> Timestamp | datetime:
    """The cluster time; the server's time, naive UTC, on a standalone server, and this machine's on mongomock.

    Args:
        database: A pymongo (or mongomock) database.
        read_deadline_s: How long a server that does not answer is asked again, in seconds.

    Raises:
        ServerUnavailableError: It did not answer.
    """
    if type(database).__module__.startswith("mongomock"):
        now = datetime.now(UTC).replace(tzinfo=None)
        return now.replace(microsecond=now.microsecond // 1000 * 1000)  # what BSON keeps
    told = Patience(deadline_s=read_deadline_s).run(lambda: database.command("hello"), "asking for the time")
    time: Timestamp | datetime = told.get("operationTime", told["localTime"])
    return time
