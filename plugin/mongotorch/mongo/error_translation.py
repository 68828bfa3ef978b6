"""Translates driver errors into the errors of `mongotorch.errors`, and redacts passwords in what people read.

The tables below have every code that mongotorch reacts to, by what it means for a caller. The names are those of
MongoDB's `error_codes.yml`, where it has one.

Guarantees: the driver's error is the `__cause__` of the translated one, and no message contains a password
or a token of an address; in doubt more is hidden.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator
from typing import Final

import bson.errors
from pymongo.errors import (
    ConnectionFailure,
    CursorNotFound,
    InvalidOperation,
    OperationFailure,
    PyMongoError,
    WriteError,
    WTimeoutError,
)

from mongotorch.errors import CodecError, MongotorchError, ServerUnavailableError, SettingError, StoreError

UNAUTHORIZED: Final = 13
MAX_TIME_MS_EXPIRED: Final = 50
NOT_YET_INITIALIZED: Final = 94  # of a replica set
USER_EXISTS: Final = 51003
NOT_AUTHENTICATED: Final = {18: "AuthenticationFailed", 8000: "AtlasError"}
"""The user name or password is wrong; hosted clusters answer with the second."""
TRANSIENT: Final = {
    6: "HostUnreachable",
    7: "HostNotFound",
    24: "LockTimeout",
    43: "CursorNotFound",
    63: "StaleShardVersion",
    64: "WriteConcernFailed",
    89: "NetworkTimeout",
    91: "ShutdownInProgress",
    112: "WriteConflict",
    133: "FailedToSatisfyReadPreference",
    134: "ReadConcernMajorityNotAvailableYet",
    175: "QueryPlanKilled",
    189: "PrimarySteppedDown",
    234: "RetryChangeStream",
    237: "CursorKilled",
    246: "SnapshotUnavailable",
    262: "ExceededTimeLimit",
    9001: "SocketException",
    10058: "LegacyNotPrimary",
    10107: "NotWritablePrimary",
    11600: "InterruptedAtShutdown",
    11602: "InterruptedDueToReplStateChange",
    13388: "StaleConfig",
    13435: "NotPrimaryNoSecondaryOk",
    13436: "NotPrimaryOrSecondary",
}
"""Codes of errors that pass: the connection, the primary or a lock was lost, and the same operation, sent again,
can succeed."""
HISTORY_LOST: Final = {
    260: "InvalidResumeToken",
    280: "ChangeStreamFatalError",
    286: "ChangeStreamHistoryLost",
    # A token that is not one, or not one of this server version:
    9: "FailedToParse",
    14: "TypeMismatch",
    40647: "resume token of a wrong type",
    40649: "resume token that is not hex",
    50811: "resume token of a wrong length",
}
"""A change stream cannot continue from its resume token."""
NO_CHANGE_STREAMS: Final = {40573: "only on replica sets", UNAUTHORIZED: "Unauthorized"}
"""This server, or this user, has no change streams."""
NO_SUCH_OPERATOR: Final = {168: "InvalidPipelineOperator", 31325: "unknown expression", 40324: "unknown stage"}
"""This server version does not know an aggregation operator."""
# Of any scheme: a mistyped address contains its password too.
_USERINFO = re.compile(r"([a-z][a-z0-9+.-]{0,31}://)([^\s:@/]*):[^\s]*@", re.IGNORECASE)
# And one with a slash too few or too many, or with blanks in the password, up to the last `@` of the line.
_MISTYPED = re.compile(
    r"((?:mongodb(?:\+srv)?|mongomock|embedded)[:/]+)([^\s:@/'\"]*):(?!\*\*\*@)[^\n]*@", re.IGNORECASE
)
_SECRET_OPTIONS = re.compile(
    r"((?:tlsCertificateKeyFilePassword|proxyPassword|authMechanismProperties)=)[^&\s'\"]*", re.IGNORECASE
)


def redact(text: str) -> str:
    """Replace the passwords in an address, or in a text that contains addresses, with `***`.

    Args:
        text: `mongodb://user:password@host/db`, or any text.

    Returns:
        The text with `***` for each password, and for each option that holds a secret.
    """
    hidden = _MISTYPED.sub(r"\1\2:***@", _USERINFO.sub(r"\1\2:***@", text))
    return _SECRET_OPTIONS.sub(r"\1***", hidden)


def has_code(error: BaseException, codes: int | Collection[int]) -> bool:
    """Whether the server failed an operation with this code, or with one of these."""
    return isinstance(error, OperationFailure) and error.code in ({codes} if isinstance(codes, int) else codes)


def is_transient(error: BaseException) -> bool:
    """Whether the same operation can succeed later: the connection, the cursor or the primary was lost."""
    if isinstance(error, ConnectionFailure | CursorNotFound | WTimeoutError):
        return True
    if not isinstance(error, OperationFailure):
        return False
    if error.code in TRANSIENT or error.has_error_label("RetryableWriteError"):
        return True
    details = error.details or {}
    concern = details.get("writeConcernErrors") or [details.get("writeConcernError") or {}]
    failed = details.get("writeErrors") or []  # of a bulk write, which itself has the code of none of them
    codes = [each.get("code") for each in (*failed, *concern)]
    return bool(codes) and all(code in TRANSIENT for code in codes if code is not None) and any(codes)


@contextlib.contextmanager
def driver_errors(doing: str, *, at: str = "the database") -> Iterator[None]:
    """Translate the driver errors raised inside; a context manager and a decorator.

    Args:
        doing: What is done inside, for the message: "publishing a component".
        at: The address, without a password.

    Raises:
        SettingError: The server refuses the user, or does not allow the operation.
        ServerUnavailableError: The server cannot be reached, or has lost its primary: it may pass.
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
    if has_code(error, UNAUTHORIZED):
        return SettingError(
            f"{doing}: {at} does not allow it ({detail}); give a URI with a user that has the role readWrite",
            setting="uri",
        )
    if isinstance(error, ConnectionFailure):
        return ServerUnavailableError(f"{doing}: {at} cannot be reached ({detail[:300]}); is it running there?")
    if is_transient(error):
        return ServerUnavailableError(f"{doing}: {at} could not do it now ({detail[:300]}); try again")
    if isinstance(error, bson.errors.BSONError) and not isinstance(error, WriteError):
        return CodecError(f"{doing}: {detail}")
    if isinstance(error, InvalidOperation):
        return StoreError(f"{doing}: {detail}; the connection may be closed")
    return StoreError(f"{doing}: {at} refused: {detail[:300]}")
