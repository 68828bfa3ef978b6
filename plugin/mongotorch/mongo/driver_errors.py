"""Says what a driver's error means: one that passes is retried, any other becomes an error of mongotorch.

The tables have every code that mongotorch reacts to, by what it means for a caller. The names are those of
MongoDB's `error_codes.yml`, where it has one. `driver_errors` translates, `redact` hides passwords in what people
read, `RetryPolicy` retries reads of documents through long outages, and `repeated` decorates the methods of
stores, which an election must not break.

The deadline of a retry counts from the first failure since the last progress: a read of an hour that breaks at its
end has the whole deadline for reconnecting. General retry libraries count from the first call
(docs/decisions/0020-file-locks-and-retries.md).

Guarantees: the driver's error is the `__cause__` of the translated one, and no message contains a password
or a token of an address; in doubt more is hidden.
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Final, ParamSpec, TypeVar, final

import bson.errors
from pymongo.errors import (
    ConnectionFailure,
    CursorNotFound,
    InvalidOperation,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
    WriteError,
    WTimeoutError,
)

from mongotorch.errors import (
    CodecError,
    MongotorchError,
    QueryError,
    ServerUnavailableError,
    SettingError,
    StoreError,
)

T = TypeVar("T")
P = ParamSpec("P")
REPEAT_S = 15.0
"""How long a method of a store is repeated; its caller decides what follows."""
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.05, 2.0
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
    136: "CappedPositionLost",
    175: "QueryPlanKilled",
    189: "PrimarySteppedDown",
    202: "NetworkInterfaceExceededTimeLimit",
    234: "RetryChangeStream",
    237: "CursorKilled",
    262: "ExceededTimeLimit",
    279: "ClientDisconnect",
    355: "InterruptedDueToStorageChange",
    365: "TemporarilyUnavailable",
    9001: "SocketException",
    10058: "LegacyNotPrimary",
    10107: "NotWritablePrimary",
    11600: "InterruptedAtShutdown",
    11601: "Interrupted",
    11602: "InterruptedDueToReplStateChange",
    13388: "StaleConfig",
    13435: "NotPrimaryNoSecondaryOk",
    13436: "NotPrimaryOrSecondary",
    46841: "ClientMarkedKilled",
}
"""Codes of errors that pass: the connection, the primary or a lock was lost, or somebody has killed the operation
or its session, and the same operation, sent again, can succeed."""
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
NO_SNAPSHOT: Final = {239: "SnapshotTooOld", 246: "SnapshotUnavailable"}
"""A collection cannot be read as it was at a time, however often it is tried: that is too long ago, or it is
capped, or its name or its indexes have changed since."""
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


def has_code(error: BaseException | None, codes: int | Collection[int]) -> bool:
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


@contextlib.contextmanager
def read_errors(collection: str) -> Iterator[None]:
    """Translate the driver errors of reading documents once.

    Args:
        collection: The name of the collection.

    Raises:
        QueryError: The server refuses the query.
        ServerUnavailableError: The server cannot be read.
    """
    try:
        yield
    except PyMongoError as error:
        kind = ServerUnavailableError if is_transient(error) else QueryError
        raise kind(f"reading collection {collection!r} failed: {error}") from error


@final
@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How long a broken read is retried.

    Attributes:
        deadline_s: Seconds without progress, from the first failure on, after which the read is given up.
        sleep: Waits for a number of seconds; replaced in tests.
        clock: Monotonic time in seconds; replaced in tests.
    """

    deadline_s: float = 60.0
    sleep: Callable[[float], object] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def attempts(self, what: str) -> Attempts:
        """The retry state of one read; `what` names the read in errors."""
        return Attempts(policy=self, what=what)

    def run(self, operation: Callable[[], T], what: str) -> T:
        """Call an operation, again as a whole after each transient error, and return its result.

        Args:
            operation: Reads something; may be called several times.
            what: Names it in errors.

        Raises:
            ServerUnavailableError: It still failed at the deadline.
            QueryError: It failed with an error that is not transient.
        """
        attempts = self.attempts(what)
        while True:
            try:
                return operation()
            except PyMongoError as error:
                attempts.failed(error)


@dataclass(kw_only=True)
class Attempts:
    """The retry state of one read."""

    policy: RetryPolicy
    what: str
    failing_since: float | None = None
    delay_s: float = field(default=_FIRST_DELAY_S)

    def succeeded(self) -> None:
        """Record progress: the next failure starts a new deadline."""
        self.failing_since, self.delay_s = None, _FIRST_DELAY_S

    def failed(self, error: PyMongoError) -> None:
        """Wait before the next attempt.

        Raises:
            ServerUnavailableError: The deadline has passed.
            QueryError: The error is not transient.
        """
        if not is_transient(error):
            raise QueryError(f"{self.what} failed: {error}") from error
        now = self.policy.clock()
        self.failing_since = now if self.failing_since is None else self.failing_since
        if now - self.failing_since >= self.policy.deadline_s:
            raise ServerUnavailableError(
                f"{self.what} failed for {self.policy.deadline_s:g} s: {error}; "
                "check the server, or raise read_deadline_s",
                setting="read_deadline_s",
            ) from error
        self.policy.sleep(self.delay_s)
        self.delay_s = min(self.delay_s * 2, _LONGEST_DELAY_S)


def repeated(doing: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a method that may be called twice: it is called again after an error that passes.

    The driver itself sends a write again once, and not every write. Where it found no server, it has waited: then
    nothing is repeated.

    Args:
        doing: What the method does, for the message: "claiming a job".

    Returns:
        The decorator; what it decorates raises as `driver_errors` says.
    """

    def decorate(method: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            deadline, delay_s = time.monotonic() + REPEAT_S, _FIRST_DELAY_S
            with driver_errors(doing):
                while True:
                    try:
                        return method(*args, **kwargs)
                    except PyMongoError as error:
                        lasts = isinstance(error, ServerSelectionTimeoutError) or not is_transient(error)
                        if lasts or time.monotonic() > deadline:
                            raise
                    time.sleep(delay_s)
                    delay_s = min(delay_s * 2, _LONGEST_DELAY_S)

        return call

    return decorate
