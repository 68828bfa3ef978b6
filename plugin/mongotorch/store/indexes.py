"""Makes the indexes that the promises rest on, or sees that they are there for a user who may not make any.

Always: who may write without making indexes finds them made; a reader of an empty database is not refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from pymongo.errors import OperationFailure

from mongotorch.store.clock import is_mock

_UNAUTHORIZED: Final = 13

Keys = str | Sequence[tuple[str, int]]


def ensure_index(collection: Any, keys: Keys, **options: Any) -> None:
    """Make an index, if it is not there.

    Args:
        collection: The driver's collection.
        keys: A field, or fields with directions.
        options: `unique`, `partialFilterExpression`.

    Raises:
        OperationFailure: The user may not make it, and it is not there.
    """
    wanted = [(keys, 1)] if isinstance(keys, str) else list(keys)
    if is_mock(collection) and _is_there(collection, wanted):
        return  # mongomock would hold all documents against it again, those outside a partial index too
    try:
        collection.create_index(wanted, **options)
    except OperationFailure as error:
        if error.code != _UNAUTHORIZED:
            raise
        if not _is_there(collection, wanted) and collection.find_one({}, {"_id": 1}) is not None:
            raise


def _is_there(collection: Any, keys: list[tuple[str, int]]) -> bool:
    return any(list(index["key"]) == keys for index in collection.index_information().values())
