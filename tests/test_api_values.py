"""Every public parameter, given what cannot be meant: one typed error at once, and nothing accepted or stored."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import uuid4

import pytest
import torch
from torch import nn

from mongotorch import (
    AllOf,
    AnyOf,
    Better,
    Changed,
    Cron,
    Datalayer,
    Dataset,
    Every,
    Metric,
    MetricAbove,
    MetricBelow,
    NewDocuments,
    Query,
    Schedule,
    TorchModel,
    Validation,
)
from mongotorch.errors import MongotorchError
from tests.helpers import fill, net, trainer

LONG = "x" * 2**20
TEXTS = ["", " ", "a b", "$gt", "a\x00b", "\ud800", LONG, "../x"]
PLAIN = [None, True, -1, 0, 3, 2**70, 1.5, -0.5, math.nan, math.inf, b"x", [], [1], (), {}, {"$gt": ""}, {1: 2}]
OBJECTS = [object(), nn.Linear, nn.Linear(1, 1), torch.zeros(2), datetime(2026, 1, 1), len, uuid4(), {1, 2}]
EVERYTHING = [*PLAIN, *TEXTS, *OBJECTS]
SECONDS_A_VALUE = 60


@dataclass(frozen=True)
class Takes:
    """What a parameter may be, among all the values above."""

    meant: Callable[[Any], bool]

    def __or__(self, other: Takes) -> Takes:
        return Takes(lambda value: self.meant(value) or other.meant(value))


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def whole(least: int) -> Takes:
    return Takes(lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least)


NOTHING = Takes(lambda value: False)
NONE = Takes(lambda value: value is None)
BOOL = Takes(lambda value: isinstance(value, bool))
TEXT = Takes(lambda value: isinstance(value, str))
POSITIVE = Takes(lambda value: number(value) and value > 0)
NATURAL = Takes(lambda value: number(value) and value >= 0)
NUMBER = Takes(number)
FRACTION = Takes(lambda value: number(value) and 0 <= value <= 1)
FUNCTION = Takes(callable)
MODULE = Takes(lambda value: isinstance(value, nn.Module))
DICT = Takes(lambda value: isinstance(value, dict))
FILTER = Takes(lambda value: isinstance(value, dict) and all(isinstance(name, str) for name in value))
NO_ITEMS = Takes(lambda value: isinstance(value, list | tuple) and not value)
DATE = Takes(lambda value: isinstance(value, datetime))
PATH = Takes(lambda value: isinstance(value, str) and value in ("x", LONG, " ", "a b", "../x"))

SELECT = Query.find("c")


def made(identifier: str = "m", **given: Any) -> TorchModel:
    return TorchModel(identifier, **{"object": net(), **given})


def schedule(**given: Any) -> Schedule:
    usual = {"trainer": trainer(SELECT), "trigger": Every(10), **given}
    return Schedule(usual.pop("identifier", "s"), **usual)


CONSTRUCTORS: dict[str, tuple[Callable[..., Any], dict[str, Takes]]] = {
    "Query.find": (
        lambda **given: Query.find(**{"collection": "c", **given}),
        {
            "collection": Takes(lambda value: isinstance(value, str) and value in (" ", "a b", "../x")),
            "filter": NONE | FILTER,
            "projection": NONE | Takes(lambda value: isinstance(value, dict | list | tuple) and not value),
        },
    ),
    "Query.aggregate": (lambda **given: Query.aggregate("c", **given), {"pipeline": NO_ITEMS}),
    "Query.skip": (SELECT.skip, {"n": whole(0)}),
    "Query.limit": (SELECT.limit, {"n": whole(1)}),
    "Query.fold": (SELECT.fold, {"name": NOTHING}),
    "Query.filter": (SELECT.filter, {"condition": FILTER}),
    "Query.sort": (
        lambda **given: SELECT.sort(**{"field": "x", **given}),
        {"field": PATH | NO_ITEMS, "direction": Takes(lambda value: type(value) is int and value == -1)},
    ),
    "TorchTrainer": (
        lambda select=SELECT, **given: trainer(select, **given),
        {
            "key": PATH,
            "select": NOTHING,
            "transform": NONE | FUNCTION,
            "signature": NOTHING,
            "data_prefetch": BOOL,
            "prefetch_size": whole(1),
            "prefetch_factor": whole(1),
            "in_memory": BOOL,
            "download": BOOL,
            "compute_kwargs": NONE | Takes(lambda value: isinstance(value, dict) and not value),
            "objective": FUNCTION,
            "loader_kwargs": NONE | Takes(lambda value: isinstance(value, dict) and not value),
            "max_iterations": whole(1),
            "no_improve_then_stop": whole(1),
            "validation_interval": NONE | whole(1),
            "listen": NOTHING,
            "optimizer_cls": NOTHING,
            "optimizer_kwargs": NONE | Takes(lambda value: isinstance(value, dict) and not value),
            "metric_values": NONE | Takes(lambda value: isinstance(value, dict) and not value),
            "optimizer_state": NONE,
            "collate_fn": NONE | FUNCTION,
            "model": NONE,
            "seed": whole(-1),
        },
    ),
    "TorchModel": (
        made,
        {
            "identifier": NOTHING,
            "object": MODULE,
            "validation": NONE,
            "preprocess": NONE | FUNCTION,
            "postprocess": NONE | FUNCTION,
            "forward_method": NOTHING,
            "train_forward_method": NOTHING,
            "preferred_devices": NOTHING,
            "eval_modules": NONE | NO_ITEMS,
        },
    ),
    "Metric": (
        lambda **given: Metric(**{"identifier": "n", "object": len, **given}),
        {"identifier": NOTHING, "object": FUNCTION, "mode": NONE},
    ),
    "Dataset": (
        lambda **given: Dataset(**{"identifier": "d", "select": SELECT, **given}),
        {"identifier": NOTHING, "select": NOTHING},
    ),
    "Validation": (
        lambda **given: Validation(**{"identifier": "v", **given}),
        {"identifier": NOTHING, "metrics": NO_ITEMS, "datasets": NO_ITEMS},
    ),
    "Schedule": (
        schedule,
        {
            "identifier": NOTHING,
            "trainer": NOTHING,
            "trigger": NOTHING,
            "gate": FUNCTION,
            "warm_start": BOOL,
            "data": NOTHING,
            "max_wait": NONE | POSITIVE,
            "paused": BOOL,
        },
    ),
    "Every": (lambda **given: Every(**{"seconds": 10, **given}), {"seconds": POSITIVE, "catch_up": BOOL}),
    "Cron": (
        lambda **given: Cron(**{"expression": "* * * * *", **given}),
        {"expression": NOTHING, "tz": NOTHING, "catch_up": BOOL},
    ),
    "NewDocuments": (
        lambda **given: NewDocuments(**{"n": 3, **given}),
        {"n": whole(1), "max_wait": NONE | POSITIVE},
    ),
    "Changed": (lambda **given: Changed(**{"n": 3, **given}), {"n": whole(1), "max_wait": NONE | POSITIVE}),
    **{
        kind.__name__: (
            lambda kind=kind, **given: kind(**{"metric": "accuracy", "threshold": 0.5, **given}),
            {"metric": NOTHING, "threshold": NUMBER, "every_s": POSITIVE, "documents": whole(1)},
        )
        for kind in (MetricAbove, MetricBelow)
    },
    "AnyOf": (lambda triggers: AnyOf(triggers), {"triggers": NOTHING}),
    "AllOf": (lambda triggers: AllOf(triggers), {"triggers": NOTHING}),
    "Better": (
        lambda **given: Better(**given),
        {"margin": NUMBER, "confidence": NONE | Takes(lambda value: number(value) and 0 < value < 1)},
    ),
    "Datalayer.connect": (
        lambda **given: Datalayer.connect(**{"uri": "mongomock://values", **given}).close(),
        {
            "uri": NONE,  # that of the settings
            "compute": NOTHING,
            "trust": NOTHING,
            "no_such_setting": NOTHING,
        },
    ),
}
METHODS: dict[str, tuple[Callable[..., Any], dict[str, Takes]]] = {
    "apply": (
        lambda db, **given: db.apply(**{"component": made("other"), **given}),
        {"component": NOTHING, "force": BOOL, "priority": whole(-10)},
    ),
    "execute": (lambda db, **given: list(db.execute(**given)), {"query": NOTHING}),
    "stream": (
        lambda db, **given: next(
            iter(db.stream(**{"query": db["points"].find(), "key": ("x", "y"), "batch_size": 8, **given}))
        ),
        {
            "query": NOTHING,
            "key": NOTHING,
            "batch_size": whole(1),
            "shuffle": BOOL,
            "seed": whole(-1),
            "shard": NOTHING,
            "fold": NONE,
            "prefetch_size": whole(1),
            "prefetch_factor": whole(1),
            "transform": NONE,
            "num_workers": Takes(lambda value: type(value) is int and 0 <= value < 10),
            "no_such_option": NOTHING,
        },
    ),
    "check": (lambda db, **given: db.check(**given), {"what": NOTHING}),
    "explain": (
        lambda db, **given: db.explain(**{"trainer": trainer(db["points"].find()), **given}),
        {"trainer": NOTHING, "step_seconds": NONE | NATURAL},
    ),
    "load": (
        lambda db, **given: db.load(**{"type_id": "model", "identifier": "m", **given}),
        {
            "type_id": NOTHING,
            "identifier": NOTHING,
            "version": NONE | Takes(lambda value: type(value) is int and value == 0),
            "alias": NONE,
        },
    ),
    "load by uuid": (lambda db, **given: db.load(**given), {"uuid": NOTHING}),
    "show": (
        lambda db, **given: db.show(**{"type_id": "model", "identifier": "m", **given}),
        {"version": NONE | Takes(lambda value: type(value) is int and value == 0)},
    ),
    "remove": (
        lambda db, **given: db.remove(**{"type_id": "model", "identifier": "m", "version": 7, **given}),
        {"type_id": NOTHING, "identifier": NOTHING, "version": NONE | whole(0), "force": BOOL},
    ),
    "promote": (
        lambda db, **given: db.promote(**{"type_id": "model", "identifier": "m", **given}),
        {
            "type_id": NOTHING,
            "identifier": NOTHING,
            "version": NONE | Takes(lambda value: type(value) is int and value == 0),
        },
    ),
    "job": (lambda db, **given: db.job(**given), {"uuid": NOTHING}),
    "pause": (lambda db, **given: db.pause(**given), {"identifier": NOTHING}),
    "resume": (lambda db, **given: db.resume(**given), {"identifier": NOTHING}),
    "fire": (lambda db, **given: db.fire(**given), {"identifier": NOTHING}),
    "preview": (
        lambda db, **given: db.preview(
            **{"schedule": schedule(), "since": datetime(2026, 1, 1), "until": datetime(2026, 1, 1, 0, 1), **given}
        ),
        {"schedule": NOTHING, "since": DATE, "until": DATE | NONE},
    ),
    "diff": (lambda db, **given: db.diff(**{"uuid2": str(uuid4()), **given}), {"uuid1": NOTHING}),
    "reproduce": (lambda db, **given: db.reproduce(**given), {"uuid": NOTHING}),
    "gc": (lambda db, **given: db.gc(**given), {"dry_run": BOOL, "grace_s": NATURAL}),
    "collection": (
        lambda db, name: db[name],
        {"name": Takes(lambda value: isinstance(value, str) and value in (" ", "a b", "../x", "x"))},
    ),
    "insert_many": (lambda db, **given: db["c"].insert_many(**given), {"documents": NO_ITEMS}),
    "insert_one": (lambda db, **given: db["c"].insert_one(**given), {"document": FILTER}),
    "count": (lambda db, **given: db["c"].count(**given), {"filter": NONE | FILTER}),
    "delete_many": (lambda db, **given: db["c"].delete_many(**given), {"filter": FILTER}),
    "assign_folds": (
        lambda db, **given: db["c"].assign_folds(**given),
        {"valid_fraction": NONE | FRACTION},
    ),
}


def shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def problems(call: Callable[..., Any], parameter: str, takes: Takes) -> list[str]:
    """What is wrong with how a parameter meets the values that it may not be."""
    found = []
    for value in EVERYTHING:
        if takes.meant(value):
            continue
        begun = time.monotonic()
        try:
            call(**{parameter: value})
        except MongotorchError as error:
            if LONG in str(error):
                found.append(f"{shown(value)}: the error repeats a megabyte")
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            found.append(f"{shown(value)}: {type(error).__name__}: {str(error)[:80]}")
        else:
            found.append(f"{shown(value)}: accepted")
        if time.monotonic() - begun > SECONDS_A_VALUE:
            found.append(f"{shown(value)}: {time.monotonic() - begun:.0f} s")
    return found


@pytest.mark.parametrize(
    ("name", "parameter"), [(name, parameter) for name, (_, given) in CONSTRUCTORS.items() for parameter in given]
)
def test_what_a_value_cannot_be_is_refused_where_it_is_made(name: str, parameter: str) -> None:
    call, given = CONSTRUCTORS[name]
    assert not problems(call, parameter, given[parameter])


@pytest.mark.parametrize(
    ("name", "parameter"), [(name, parameter) for name, (_, given) in METHODS.items() for parameter in given]
)
def test_what_an_argument_cannot_be_is_refused_by_the_datalayer(name: str, parameter: str) -> None:
    call, given = METHODS[name]
    with Datalayer.connect(f"mongomock://v{uuid4().hex[:8]}", progress=False) as db:
        fill(db)
        db.apply(made())
        assert not problems(lambda **one: call(db, **one), parameter, given[parameter])
