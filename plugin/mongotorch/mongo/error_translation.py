"""Translates driver errors into the errors of `mongotorch.errors`, and names the server's error codes.

Every code that mongotorch reacts to is in `ServerCode`; what it means for a caller is in the groups below it. The
names are those of MongoDB's `error_codes.yml`, where it gives one.

Guarantees: the driver's error is the `__cause__` of the translated one, and no message contains a password.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Collection, Iterator
from typing import Final

import bson.errors
from pymongo.errors import (
    AutoReconnect,
    ConnectionFailure,
    CursorNotFound,
    InvalidOperation,
    OperationFailure,
    PyMongoError,
    WaitQueueTimeoutError,
    WriteError,
)

from mongotorch.errors import CodecError, MongotorchError, ServerUnavailableError, SettingError, StoreError
from mongotorch.mongo.redact import redact


class ServerCode(enum.IntEnum):
    """The server's error codes that mongotorch reacts to."""

    HOST_UNREACHABLE = 6
    HOST_NOT_FOUND = 7
    FAILED_TO_PARSE = 9
    UNAUTHORIZED = 13
    TYPE_MISMATCH = 14
    AUTHENTICATION_FAILED = 18
    CURSOR_NOT_FOUND = 43
    MAX_TIME_MS_EXPIRED = 50
    STALE_SHARD_VERSION = 63
    NETWORK_TIMEOUT = 89
    SHUTDOWN_IN_PROGRESS = 91
    NOT_YET_INITIALIZED = 94
    FAILED_TO_SATISFY_READ_PREFERENCE = 133
    READ_CONCERN_MAJORITY_NOT_AVAILABLE_YET = 134
    INVALID_PIPELINE_OPERATOR = 168
    QUERY_PLAN_KILLED = 175
    PRIMARY_STEPPED_DOWN = 189
    CURSOR_KILLED = 237
    INVALID_RESUME_TOKEN = 260
    EXCEEDED_TIME_LIMIT = 262
    CHANGE_STREAM_FATAL = 280
    CHANGE_STREAM_HISTORY_LOST = 286
    ATLAS_ERROR = 8000
    SOCKET_EXCEPTION = 9001
    LEGACY_NOT_PRIMARY = 10058
    NOT_WRITABLE_PRIMARY = 10107
    INTERRUPTED_AT_SHUTDOWN = 11600
    INTERRUPTED_BY_STATE_CHANGE = 11602
    STALE_CONFIG = 13388
    NOT_PRIMARY_NO_SECONDARY_OK = 13435
    NOT_PRIMARY_OR_SECONDARY = 13436
    UNKNOWN_EXPRESSION = 31325
    UNKNOWN_STAGE = 40324
    CHANGE_STREAM_NEEDS_REPLICA_SET = 40573
    RESUME_TOKEN_WRONG_TYPE = 40647
    RESUME_TOKEN_NOT_HEX = 40649
    RESUME_TOKEN_WRONG_LENGTH = 50811


NOT_AUTHENTICATED: Final = frozenset({ServerCode.AUTHENTICATION_FAILED, ServerCode.ATLAS_ERROR})
"""The user name or password is wrong; hosted clusters answer with the second."""
TRANSIENT: Final = frozenset(
    {
        ServerCode.HOST_UNREACHABLE,
        ServerCode.HOST_NOT_FOUND,
        ServerCode.CURSOR_NOT_FOUND,
        ServerCode.STALE_SHARD_VERSION,
        ServerCode.NETWORK_TIMEOUT,
        ServerCode.SHUTDOWN_IN_PROGRESS,
        ServerCode.FAILED_TO_SATISFY_READ_PREFERENCE,
        ServerCode.READ_CONCERN_MAJORITY_NOT_AVAILABLE_YET,
        ServerCode.QUERY_PLAN_KILLED,
        ServerCode.PRIMARY_STEPPED_DOWN,
        ServerCode.CURSOR_KILLED,
        ServerCode.EXCEEDED_TIME_LIMIT,
        ServerCode.SOCKET_EXCEPTION,
        ServerCode.LEGACY_NOT_PRIMARY,
        ServerCode.NOT_WRITABLE_PRIMARY,
        ServerCode.INTERRUPTED_AT_SHUTDOWN,
        ServerCode.INTERRUPTED_BY_STATE_CHANGE,
        ServerCode.STALE_CONFIG,
        ServerCode.NOT_PRIMARY_NO_SECONDARY_OK,
        ServerCode.NOT_PRIMARY_OR_SECONDARY,
    }
)
"""The same read, sent again, can succeed."""
HISTORY_LOST: Final = frozenset(
    {
        ServerCode.INVALID_RESUME_TOKEN,
        ServerCode.CHANGE_STREAM_FATAL,
        ServerCode.CHANGE_STREAM_HISTORY_LOST,
        # The token is not one at all, or not one that this server version writes.
        ServerCode.FAILED_TO_PARSE,
        ServerCode.TYPE_MISMATCH,
        ServerCode.RESUME_TOKEN_WRONG_TYPE,
        ServerCode.RESUME_TOKEN_NOT_HEX,
        ServerCode.RESUME_TOKEN_WRONG_LENGTH,
    }
)
"""A change stream cannot continue from its resume token."""
NO_CHANGE_STREAMS: Final = frozenset({ServerCode.CHANGE_STREAM_NEEDS_REPLICA_SET, ServerCode.UNAUTHORIZED})
"""This server (a standalone one) or this user has no change streams."""
NO_SUCH_OPERATOR: Final = frozenset(
    {ServerCode.INVALID_PIPELINE_OPERATOR, ServerCode.UNKNOWN_EXPRESSION, ServerCode.UNKNOWN_STAGE}
)
"""This server version does not know an aggregation operator."""


def has_code(error: Exception, *codes: int | Collection[int]) -> bool:
    """Whether the server failed an operation with one of these codes, or a code of one of these groups."""
    if not isinstance(error, OperationFailure):
        return False
    return any(error.code == each if isinstance(each, int) else error.code in each for each in codes)


def is_transient(error: Exception) -> bool:
    """Whether the same read can succeed later: the connection, the cursor or the primary was lost."""
    lost = AutoReconnect | CursorNotFound | WaitQueueTimeoutError
    return isinstance(error, lost) or has_code(error, TRANSIENT)


@contextlib.contextmanager
def driver_errors(doing: str, *, at: str = "the database") -> Iterator[None]:
    """Translate the driver errors raised inside; a context manager and a decorator.

    Args:
        doing: What is done inside, for the message: "publishing a component".
        at: The address, without a password.

    Raises:
        SettingError: The server refuses the user, or does not allow the operation.
        ServerUnavailableError: The server cannot be reached.
        CodecError: BSON cannot hold a value.
        StoreError: The server refused the operation, or the connection is closed.
    """
    try:
        yield
    except (PyMongoError, bson.errors.BSONError) as error:
        raise translated(error, doing=doing, at=at) from error


def translated(error: Exception, *, doing: str, at: str) -> MongotorchError:
    """The mongotorch error for a driver error; see `driver_errors`."""
    detail = redact(str(error)).splitlines()[0] if str(error) else type(error).__name__
    if has_code(error, NOT_AUTHENTICATED):
        return SettingError(
            f"{doing}: {at} refuses the user name or password of the URI ({detail}); check them, and `authSource`",
            setting="uri",
        )
    if has_code(error, ServerCode.UNAUTHORIZED):
        return SettingError(
            f"{doing}: {at} does not allow it ({detail}); give a URI with a user that has the role readWrite",
            setting="uri",
        )
    if isinstance(error, ConnectionFailure):
        return ServerUnavailableError(f"{doing}: {at} cannot be reached ({detail[:300]}); is it running there?")
    if isinstance(error, bson.errors.BSONError) and not isinstance(error, WriteError):
        return CodecError(f"{doing}: {detail}")
    if isinstance(error, InvalidOperation):
        return StoreError(f"{doing}: {detail}; the connection may be closed")
    return StoreError(f"{doing}: {at} refused: {detail[:300]}")
