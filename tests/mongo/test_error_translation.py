"""Each driver error becomes one of ours, without a password."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from bson.errors import InvalidDocument
from pymongo.errors import (
    AutoReconnect,
    ConfigurationError,
    DuplicateKeyError,
    OperationFailure,
    PyMongoError,
)

from mongotorch.errors import (
    CodecError,
    MongotorchError,
    ServerUnavailableError,
    SettingError,
    StoreError,
)
from mongotorch.mongo.error_translation import driver_errors, translated


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


def test_no_error_holds_a_password_and_errors_of_ours_pass() -> None:
    error = OperationFailure("mongodb://me:s3cret@h refused", 99)
    assert "s3cret" not in translated(error, doing="d", at="a").message

    ours = StoreError("ours")
    with contextlib.suppress(StoreError), driver_errors("doing"):
        raise ours
    assert ours.__cause__ is None
