"""Following an alias: woken by the server when it is moved, by looking again where the server wakes nobody.

Always: the change stream is open before the first look, so that no move falls between the two; a stream that
breaks is an error, so that who follows opens another one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from mongotorch.errors import StoreError
from mongotorch.store.aliases import COLLECTION
from mongotorch.store.failures import driver_errors
from mongotorch.store.waiting import Wake, open_stream, poller


@contextlib.contextmanager
def following(database: Any, type_id: str, identifier: str, alias: str) -> Iterator[Wake]:
    """Follow an alias.

    Args:
        database: The driver's database.
        type_id: The kind.
        identifier: The name.
        alias: The alias.

    Yields:
        A function that waits for seconds at most, a second at most, or until the alias is moved. It raises
        StoreError and ServerUnavailableError, when whoever follows has to begin anew.
    """
    moved = {"type_id": type_id, "identifier": identifier, "alias": alias}
    match = {"operationType": "insert", **{f"fullDocument.{field}": value for field, value in moved.items()}}
    stream = open_stream(database[COLLECTION], match, doing="following an alias")
    if stream is None:
        yield poller()
        return

    def wake(left: float) -> None:  # noqa: ARG001 - the server waits as long as it was told when it was opened
        with driver_errors("following an alias"):
            if stream.alive:
                stream.try_next()
                return
        raise StoreError("following an alias: the server ended the change stream")

    with stream:
        yield wake
