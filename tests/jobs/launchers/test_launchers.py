"""Launchers by their names, the local one, and errors that cross from one process to another."""

from __future__ import annotations

from typing import Any

import bson
import pytest

from mongotorch.errors import (
    DtypeError,
    JobProcessError,
    ServerUnavailableError,
    SettingError,
    TrainingError,
    UnsupportedError,
)
from mongotorch.jobs import LocalEngine, engine_named
from mongotorch.jobs.failures import described, rebuilt
from mongotorch.jobs.launchers import Launcher, LocalLauncher, RankCall, launcher_named
from mongotorch.testing.launchers import LauncherSuite


class TestLocal(LauncherSuite):
    @pytest.fixture
    def launcher(self) -> Launcher:
        return LocalLauncher()


def test_an_unknown_launcher_is_refused_with_the_names_of_those_there_are() -> None:
    with pytest.raises(SettingError, match="joined, local, ray, torchrun") as raised:
        launcher_named("slurm")
    assert raised.value.setting == "launcher"


def test_the_name_of_a_launcher_is_an_engine_that_runs_here() -> None:
    assert isinstance(engine_named("torchrun"), LocalEngine)


def test_the_local_launcher_refuses_several_workers() -> None:
    with pytest.raises(UnsupportedError, match="and not 2"):
        LocalLauncher().run(RankCall(function="os:getpid"), workers=2, resources={}, device="cpu", check=print)


class OddError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize(
    ("error", "kind", "transient"),
    [
        (DtypeError("no", document_id=bson.ObjectId(), field="a.b"), DtypeError, False),
        (SettingError("no", setting="uri"), SettingError, False),
        (JobProcessError("it died"), JobProcessError, True),
        (ValueError("a plain one"), ValueError, False),
        (MemoryError("none left"), MemoryError, True),
        (KeyError("x"), TrainingError, False),  # the text of another `KeyError` would have more quotes
        (OddError(1, 2), TrainingError, False),
        (bson.errors.InvalidDocument("no such thing"), TrainingError, False),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_an_error_is_made_again_with_its_name_text_and_details(
    error: Exception, kind: type[Exception], transient: bool
) -> None:
    sent: dict[str, Any] = bson.decode(bson.encode(described(error)))
    made = rebuilt(sent, where="rank 1 of 2")
    assert isinstance(made, kind)
    assert (type(made).__name__, str(made)) == (type(error).__name__, str(error))
    for detail in ("document_id", "field", "setting"):
        assert getattr(made, detail, None) == getattr(error, detail, None)
    assert made.__notes__[0].startswith("on rank 1 of 2")
    assert sent["transient"] is transient


def test_an_unknown_error_of_the_database_is_one_of_the_database_again() -> None:
    made = rebuilt({"type": "AutoReconnect", "message": "gone", "transient": True}, where="rank 0 of 2")
    assert isinstance(made, ServerUnavailableError)
