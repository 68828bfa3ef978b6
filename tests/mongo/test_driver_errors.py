"""Each driver error becomes one of ours, one that passes is retried, and no password is in what people read."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import pytest
from bson.errors import InvalidDocument
from hypothesis import given
from hypothesis import strategies as st
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    ConfigurationError,
    DuplicateKeyError,
    OperationFailure,
    PyMongoError,
    WriteConcernError,
    WTimeoutError,
)

from mongotorch.datalayer import Datalayer
from mongotorch.errors import (
    CodecError,
    MongotorchError,
    QueryError,
    ServerUnavailableError,
    SettingError,
    StoreError,
)
from mongotorch.mongo.driver_errors import (
    TRANSIENT,
    RetryPolicy,
    driver_errors,
    is_transient,
    redact,
    translated,
)

_word = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=12)
_secret = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=4, max_size=20)


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (OperationFailure("bad auth", 18), SettingError, "user name or password"),
        (OperationFailure("bad auth", 8000), SettingError, "user name or password"),
        (OperationFailure("not authorized on db", 13), SettingError, "does not allow it"),
        (AutoReconnect("connection refused"), ServerUnavailableError, "cannot be reached"),
        (DuplicateKeyError("E11000"), StoreError, "refused"),
        (InvalidDocument("cannot encode"), CodecError, "cannot encode"),
        (ConfigurationError("odd"), StoreError, "odd"),
        (PyMongoError(""), StoreError, "PyMongoError"),
    ],
)
def test_each_error_of_the_driver_has_its_place_in_the_tree(
    error: Any, kind: type[MongotorchError], says: str
) -> None:
    with pytest.raises(kind, match=says) as caught, driver_errors("saving", at="mongodb://h"):
        raise error

    assert caught.value.__cause__ is error
    assert "saving" in caught.value.message


@pytest.mark.parametrize("code", sorted(TRANSIENT))
def test_each_passing_code_passes_alone_and_in_a_bulk_write(code: int) -> None:
    bulk = {"writeErrors": [], "writeConcernErrors": [{"code": code}]}
    for error in (
        OperationFailure("no", code),
        BulkWriteError({**bulk, "writeErrors": [{"code": code, "errmsg": "no"}]}),
        BulkWriteError(bulk),
        WriteConcernError("no", code),
        WTimeoutError("no", 64),
    ):
        assert isinstance(translated(error, doing="d", at="a"), ServerUnavailableError)


@pytest.mark.parametrize("codes", [[], [11000], [11000, 91]])
def test_a_bulk_write_with_an_error_that_stays_does_not_pass(codes: list[int]) -> None:
    failed = {"writeErrors": [{"code": code, "errmsg": "no"} for code in codes], "writeConcernErrors": []}
    assert not is_transient(BulkWriteError(failed))
    assert not is_transient(DuplicateKeyError("no", 11000))


def test_no_error_holds_a_password_and_errors_of_ours_pass() -> None:
    error = OperationFailure("mongodb://me:s3cret@h refused", 99)
    assert "s3cret" not in translated(error, doing="d", at="a").message

    ours = StoreError("ours")
    with contextlib.suppress(StoreError), driver_errors("doing"):
        raise ours
    assert ours.__cause__ is None


@given(_word, _secret, _word, st.sampled_from(["", "?authSource=admin", "/shop?tls=true"]))
def test_no_password_survives_redaction(user: str, secret: str, host: str, rest: str) -> None:
    address = f"mongodb://{user}:<{secret}>@{host}{rest}"

    for text in (address, f"cannot reach {address}, is it up?", f"{address} {address}"):
        assert f"<{secret}>" not in redact(text)
        assert f"mongodb://{user}:***@" in redact(text)


@pytest.mark.parametrize("option", ["tlsCertificateKeyFilePassword", "authMechanismProperties", "proxyPassword"])
def test_options_that_hold_secrets_are_hidden(option: str) -> None:
    found = redact(f"mongodb://h/db?w=1&{option}=s3cret&tls=true")

    assert "s3cret" not in found
    assert found.endswith("&tls=true")


@pytest.mark.parametrize(
    "address",
    [
        *("mongodb:/me:s3cret@h/db", "mongodb:me:s3cret@h", "mongodb:///me:s3cret@h", "MongoDB+srv:/me:s3cret@h"),
        *(
            "mongodb://me:s3 cret@h/db",
            "mongodb://me: s3cret @h",
            "mongodb://me:s3cret/x@h",
            "mongomock:/me:s3cret@h",
        ),
        *("mongodb:/me:s3cret@x s3cret@h", "mongodb//me:s3cret@h"),
    ],
)
def test_a_mistyped_address_hides_its_password_too(address: str) -> None:
    for text in (address, f"uri {address!r} is no address", f"first line\n{address}\nuser@example.net"):
        assert "s3" not in redact(text)
        assert "cret" not in redact(text)
    with pytest.raises((SettingError, ServerUnavailableError)) as caught:
        Datalayer.connect(address, server_timeout_s=0.1)
    assert "cret" not in str(caught.value)


def test_text_without_an_address_stays_as_it_is() -> None:
    text = "a@b: mongodb://h/db has 3 documents, see user@example.net"

    assert redact(text) == text


def test_a_long_text_without_an_address_is_looked_through_at_once() -> None:
    begun = time.monotonic()
    assert redact("x" * 200_000) == "x" * 200_000
    assert time.monotonic() - begun < 5


class Time:
    """A clock that only sleeping advances."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, list[float]()

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)

    def policy(self, deadline_s: float) -> RetryPolicy:
        return RetryPolicy(deadline_s=deadline_s, sleep=self.sleep, clock=lambda: self.now)


def failing(*errors: PyMongoError) -> tuple[list[int], Callable[[], str]]:
    calls: list[int] = []

    def operation() -> str:
        calls.append(1)
        if len(calls) <= len(errors):
            raise errors[len(calls) - 1]
        return "read"

    return calls, operation


def test_transient_errors_are_retried_with_a_growing_pause() -> None:
    time = Time()
    calls, operation = failing(*[AutoReconnect("gone")] * 8)

    assert time.policy(60).run(operation, "reading") == "read"
    assert len(calls) == 9
    assert time.pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]


def test_any_other_error_is_raised_at_once() -> None:
    time = Time()
    calls, operation = failing(OperationFailure("bad query", 2))

    with pytest.raises(QueryError, match="reading failed: bad query") as caught:
        time.policy(60).run(operation, "reading")
    assert isinstance(caught.value.__cause__, OperationFailure)
    assert (len(calls), time.pauses) == (1, [])


def test_the_deadline_counts_from_the_first_failure_since_the_last_progress() -> None:
    time = Time()
    attempts = time.policy(1.0).attempts("reading")
    error = AutoReconnect("gone")
    for _ in range(20):
        time.now += 3600.0  # a long read that succeeds in the end
        attempts.failed(error)
        attempts.succeeded()

    _, stays_away = failing(*[error] * 99)
    with pytest.raises(ServerUnavailableError, match="failed for 1 s") as caught:
        time.policy(1.0).run(stays_away, "reading")
    assert sum(time.pauses[20:]) >= 1
    assert caught.value.setting == "read_deadline_s"
    assert caught.value.__cause__ is error
