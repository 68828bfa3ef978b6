"""Launchers by their names, the local one, and errors that cross from one process to another."""

from __future__ import annotations

import contextlib
from typing import Any

import bson
import pytest
import torch
from tests.helpers import model, trainer

from mongotorch.errors import (
    DtypeError,
    JobProcessError,
    ParameterError,
    ServerUnavailableError,
    SettingError,
    TrainingError,
    UnsupportedError,
)
from mongotorch.jobs import LocalEngine, engine_named
from mongotorch.jobs.failures import described, rebuilt
from mongotorch.jobs.launchers import Launcher, LocalLauncher, RankCall, launcher_named
from mongotorch.query import Query
from mongotorch.services.training import recipe
from mongotorch.testing.launchers import LauncherSuite
from mongotorch.train import Alone
from mongotorch.worker import rank


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


@pytest.mark.parametrize(("here", "devices", "is_refused"), [("4", 1, True), ("2", 2, False), ("4", 0, True)])
def test_more_processes_than_devices_of_a_machine_are_refused(
    here: str, devices: int, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 8)
    joined = launcher_named("joined")
    assert joined.free({}, device="cpu") == 8
    with pytest.raises(UnsupportedError, match=f"there are {devices}") if is_refused else contextlib.nullcontext():
        assert joined.free({}, device="cuda") == 8
    assert launcher_named("torchrun").free({}, device="cuda") == devices
    assert launcher_named("torchrun").free({}, device="cpu") is None


@pytest.mark.parametrize(
    ("devices", "local", "expected"),
    [(0, "1", ("gloo", [])), (2, "1", ("cpu:gloo,cuda:nccl", [1])), (2, "3", ("cpu:gloo,cuda:nccl", [1]))],
)
def test_a_rank_takes_the_device_of_its_number_and_nccl_for_it(
    devices: int, local: str, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    backends: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr("torch.cuda.is_available", lambda: devices > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend, **_: backends.append(backend))
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    monkeypatch.setattr(rank, "ProcessGroup", lambda: Alone())
    with rank.joined_group():
        assert (*backends, chosen) == expected


@pytest.mark.parametrize(
    ("device", "given", "words"),
    [("cuda:1", {"device": "cuda:1"}, "its own; name it 'cuda'"), ("cuda:0", {}, "its own"), ("mps", {}, "'mps'")],
)
def test_several_workers_do_not_share_one_device(
    device: str, given: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "training_device", lambda *_: torch.device(device))
    made = trainer(Query.find("points"), compute_kwargs={**given, "workers": 2})
    with pytest.raises(ParameterError, match=words) as raised:
        _ = recipe.TrainingRecipe(trainer=made, model=model()).device_type
    assert raised.value.field == "compute_kwargs"
    alone = trainer(Query.find("points"), compute_kwargs={**given, "workers": 1, "lanes": 2})
    assert recipe.TrainingRecipe(trainer=alone, model=model()).device_type == torch.device(device).type
