"""Ranks over streams of a database: rows that are left out, epochs, and a run that goes on with another number."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
from tests.helpers import COLLECTION, fill, net, same, state, trainer

from mongotorch import Datalayer, TorchModel, TorchTrainer
from mongotorch.data import Stream
from mongotorch.errors import DataError
from mongotorch.testing.groups import run_ranks
from mongotorch.train import Alone, Fit, Group, Stepped

GIVEN: dict[str, Any] = {
    "compute_kwargs": {"workers": (1, 4), "lanes": 4},
    "max_iterations": 10**100,
    "max_epochs": 3,
    "validation_interval": "epoch",
    "gradient_accumulation_steps": 2,
    "loader_kwargs": {"batch_size": 8, "shuffle": True},
}


def without_some(x: Any, y: int) -> Any:
    if x[0] > 0.0:
        raise ValueError("too large")
    return x, y


def ran(db: Any, of: TorchTrainer, group: Group, captured: Any = None, most: int = 10**9, **given: Any) -> Any:
    """Events, and weights or what was captured after so many steps."""
    select, connection = db[COLLECTION].find(), db._connection
    options: dict[str, Any] = {"key": ("x", "y"), "batch_size": 8, "prefetch_size": 20, **given}
    with ExitStack() as opened:

        def stream(fold: Any, shuffle: bool, fields: Any) -> Stream:
            first = opened.enter_context(db.stream(select, fold=fold, shuffle=shuffle, **options))
            made = Stream(connection.opener, replace(first.spec, **fields), database=connection.database)
            opened.callback(made.close)
            return made

        batches = stream("train", True, of.lanes.training_stream(group.rank, group.world))
        valid = stream("valid", False, of.lanes.validation_stream(group.rank, group.world))
        model = TorchModel("m", object=copy.deepcopy(NET))
        fit = Fit(of, model, batches=batches, sets={"": valid}, state=captured, group=group)
        fit.check()
        run, seen = fit.run(), []
        for event in run:
            seen.append((event.step, event.rows, event.skipped) if isinstance(event, Stepped) else event.values)
            if isinstance(event, Stepped) and event.step == most:
                found = fit.capture()
                run.close()
                return seen, found
        return seen, [state(model), fit.trained().optimizer_state, batches.report.skipped]


NET = net()


@pytest.mark.parametrize(
    "given",
    [{}, {"transform": without_some, "on_bad_document": "skip"}, {"in_memory": True}],
    ids=["streamed", "some left out", "in memory"],
)
def test_any_number_of_ranks_gives_the_same_bits(db: Datalayer, given: Any) -> None:
    fill(db)
    of = trainer(db[COLLECTION].find(), **GIVEN)
    alone = ran(db, of, Alone(), **given)
    if "transform" in given:
        assert alone[1][2] > 10
    for found in run_ranks(4, lambda group: ran(db, of, group, **given)):
        assert not isinstance(found, Exception), found
        assert found[0] == alone[0]
        assert same(found[1], alone[1])
    captured = None
    for world, most in ((4, 3), (2, 8)):
        first = run_ranks(world, lambda group, c=captured, m=most: ran(db, of, group, c, m, **given))[0]  # type: ignore[misc]
        assert not isinstance(first, Exception), first
        captured = first[1]
    assert same(ran(db, of, Alone(), captured, **given)[1], alone[1])


def test_documents_that_are_gone_on_one_rank_end_all(db: Datalayer) -> None:
    fill(db)
    of = trainer(db[COLLECTION].find(), **GIVEN)

    def rank_main(group: Group) -> Any:
        if group.rank:  # as if some were deleted between the reading of one and the other
            query = db[COLLECTION].find({"n": {"$ne": 60}})
            return ran(_Other(db, query), of, group)
        return ran(db, of, group)

    assert [type(one) for one in run_ranks(2, rank_main, timeout_s=30)] == [DataError] * 2


class _Other:
    """A datalayer whose collection finds something else."""

    def __init__(self, db: Datalayer, query: Any) -> None:
        self._db, self._query, self._connection = db, query, db._connection
        self.stream = db.stream

    def __getitem__(self, name: str) -> Any:
        return self

    def find(self) -> Any:
        return self._query
