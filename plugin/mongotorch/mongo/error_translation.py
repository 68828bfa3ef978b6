"""From what the driver raises to what a person can act on.

Always: an error that leaves the store is one of `mongotorch.errors`, the driver's own is its `__cause__`, and
no message holds a password.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import bson.errors
from pymongo.errors import ConnectionFailure, InvalidOperation, OperationFailure, PyMongoError, WriteError

from mongotorch.errors import CodecError, MongotorchError, ServerUnavailableError, SettingError, StoreError
from mongotorch.mongo.redact import redact

_UNAUTHORIZED, _AUTHENTICATION_FAILED = 13, 18
_NOT_AUTHENTICATED = {_AUTHENTICATION_FAILED, 8000}  # the second is what hosted clusters say


@contextlib.contextmanager
def driver_errors(doing: str, *, at: str = "the database") -> Iterator[None]:
    """Turn what the driver raises inside into errors of the tree.

    Args:
        doing: What is done inside, for the message: "publishing a component".
        at: Where, without a password.
    """
    try:
        yield
    except (PyMongoError, bson.errors.BSONError) as error:
        raise translated(error, doing=doing, at=at) from error


def translated(error: Exception, *, doing: str, at: str) -> MongotorchError:
    """The error of the tree for one of the driver's."""
    said = redact(str(error)).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, OperationFailure) and error.code in _NOT_AUTHENTICATED:
        return SettingError(
            f"{doing}: {at} refuses the user name or password of the URI ({said}); check them, and `authSource`",
            setting="uri",
        )
    if isinstance(error, OperationFailure) and error.code == _UNAUTHORIZED:
        return SettingError(
            f"{doing}: {at} does not allow it ({said}); give a URI with a user that has the role readWrite",
            setting="uri",
        )
    if isinstance(error, ConnectionFailure):
        return ServerUnavailableError(f"{doing}: {at} cannot be reached ({said[:300]}); is it running there?")
    if isinstance(error, bson.errors.BSONError) and not isinstance(error, WriteError):
        return CodecError(f"{doing}: {said}")
    if isinstance(error, InvalidOperation):
        return StoreError(f"{doing}: {said}; the connection may be closed")
    return StoreError(f"{doing}: {at} refused: {said[:300]}")
