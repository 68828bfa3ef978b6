"""The mirror of Weights & Biases, against a stand-in for its package: nothing is logged twice, or left out."""

from __future__ import annotations

import sys
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from tests.mirrors.mirrored import Written, update

from mongotorch import Datalayer
from mongotorch.errors import SettingError
from mongotorch.mirrors import open_mirror


class CommError(Exception):
    pass


class Run:
    """A run, as the service keeps it and as `init` gives it."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given, self.rows, self.exits = given, list[dict[str, Any]](), list[int]()
        self.summary: dict[str, Any] = {}

    def define_metric(self, *_: Any, **__: Any) -> None:
        return

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def scan_history(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def finish(self, *, exit_code: int) -> None:
        self.exits.append(exit_code)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Run]]:
    """The runs by their path."""
    runs: dict[str, Run] = {}

    class Api:
        def run(self, path: str) -> Run:
            if path not in runs:
                raise CommError(f"Could not find run <Run {path}>")
            return runs[path]

    def init(**given: Any) -> Run:
        assert given["resume"] == "allow"
        path = "/".join(part for part in (given["entity"], given["project"], given["id"]) if part)
        return runs.setdefault(path, Run(given))

    fake: Any = types.ModuleType("wandb")
    fake.Api, fake.init, fake.errors = Api, init, types.SimpleNamespace(CommError=CommError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delitem(sys.modules, "mongotorch.mirrors.wandb", raising=False)
    yield runs
    sys.modules.pop("mongotorch.mirrors.wandb", None)


def test_rows_are_logged_once_and_the_end_is_told(db: Datalayer, uri: str, service: dict[str, Run]) -> None:
    run = Written(db)
    run.measure(1, 2)
    assert update(uri, "wandb:me/shop") == 2
    run.measure(2, 3)
    run.measure(2, kind="valid")
    assert update(uri, "wandb:me/shop") == 2
    run.measure(4)
    run.fail()
    assert update(uri, "wandb:me/shop") == 1
    assert update(uri, "wandb:me/shop") == 0

    found = service[f"me/shop/{run.uuid}"]
    has = Counter((tag, row["step"]) for row in found.rows for tag in row if "/" in tag)
    assert has == run.expected()
    assert found.given["config"]["max_iterations"] == 7
    assert found.exits[-1] == 1
    assert found.summary == {"mongotorch_complete": 1}


def test_a_network_that_is_away_is_no_run_that_is_not_there(
    db: Datalayer, service: dict[str, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Written(db)
    run.measure(1)

    def away(*_: Any) -> None:
        raise CommError("HTTP 502")

    with open_mirror("wandb:shop", db) as target:
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["wandb"].Api, "run", away)
            assert target.update(db) == 0
        assert service == {}
        assert target.update(db) == 1
    assert list(service) == [f"shop/{run.uuid}"]


@pytest.mark.parametrize("target", ["a/b/c", "a/"])
def test_a_project_has_a_name(db: Datalayer, service: dict[str, Run], target: str) -> None:
    with pytest.raises(SettingError, match="PROJECT"):
        open_mirror(f"wandb:{target}", db)
