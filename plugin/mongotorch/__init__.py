"""Trains PyTorch models where the data lives: the public names of mongotorch.

Guarantees: importing this imports neither torch nor a driver; a name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mongotorch._version import __version__

if TYPE_CHECKING:
    from mongotorch.component import Component
    from mongotorch.data.collection import Collection
    from mongotorch.datalayer import Datalayer
    from mongotorch.errors import MongotorchError
    from mongotorch.jobs import Job
    from mongotorch.query import Query
    from mongotorch.schedule import (
        AllOf,
        Always,
        AnyOf,
        Better,
        Changed,
        Cron,
        Decision,
        Every,
        Firing,
        Gate,
        MetricAbove,
        MetricBelow,
        Never,
        NewDocuments,
        Schedule,
        Scores,
        State,
        Trigger,
        Verdict,
    )
    from mongotorch.services.versions.live import Live
    from mongotorch.settings import Settings
    from mongotorch.split import ByGroup, ByHash, ByStoredFold, ByTime, KFold, Split
    from mongotorch.store import Move
    from mongotorch.train import Dataset, Metric, TorchModel, TorchTrainer, Validation
    from mongotorch.train.mapping import Passed
    from mongotorch.worker import Worker

# In `__all__`, and what records and pickles may name besides: such a name is kept for ever.
_HOMES = {
    "AllOf": "mongotorch.schedule",
    "Always": "mongotorch.schedule",
    "AnyOf": "mongotorch.schedule",
    "Asked": "mongotorch.schedule.gates",
    "Better": "mongotorch.schedule",
    "Changed": "mongotorch.schedule",
    "Collection": "mongotorch.data.collection",
    "Component": "mongotorch.component",
    "ByGroup": "mongotorch.split",
    "ByHash": "mongotorch.split",
    "ByStoredFold": "mongotorch.split",
    "ByTime": "mongotorch.split",
    "Cron": "mongotorch.schedule",
    "Datalayer": "mongotorch.datalayer",
    "Dataset": "mongotorch.train",
    "Decision": "mongotorch.schedule",
    "Engine": "mongotorch.jobs",
    "Every": "mongotorch.schedule",
    "Firing": "mongotorch.schedule",
    "Gate": "mongotorch.schedule",
    "Job": "mongotorch.jobs",
    "KFold": "mongotorch.split",
    "Key": "mongotorch.signature",
    "Live": "mongotorch.services.versions.live",
    "LocalEngine": "mongotorch.jobs",
    "Metric": "mongotorch.train",
    "MetricAbove": "mongotorch.schedule",
    "MetricBelow": "mongotorch.schedule",
    "MongotorchError": "mongotorch.errors",
    "Move": "mongotorch.store",
    "Never": "mongotorch.schedule",
    "NewDocuments": "mongotorch.schedule",
    "Passed": "mongotorch.train.mapping",
    "Query": "mongotorch.query",
    "QueueEngine": "mongotorch.jobs",
    "Schedule": "mongotorch.schedule",
    "Scores": "mongotorch.schedule",
    "Settings": "mongotorch.settings",
    "Split": "mongotorch.split",
    "State": "mongotorch.schedule",
    "TorchModel": "mongotorch.train",
    "TorchTrainer": "mongotorch.train",
    "TrainingStep": "mongotorch.train.step",
    "Trigger": "mongotorch.schedule",
    "Validation": "mongotorch.train",
    "Verdict": "mongotorch.schedule",
    "Waited": "mongotorch.schedule.triggers.documents",
    "Worker": "mongotorch.worker",
    "preview": "mongotorch.schedule",
    "restore_parametrized": "mongotorch.train.tensor_codec",
}

__all__ = [
    "AllOf",
    "Always",
    "AnyOf",
    "Better",
    "ByGroup",
    "ByHash",
    "ByStoredFold",
    "ByTime",
    "Changed",
    "Collection",
    "Component",
    "Cron",
    "Datalayer",
    "Dataset",
    "Decision",
    "Every",
    "Firing",
    "Gate",
    "Job",
    "KFold",
    "Live",
    "Metric",
    "MetricAbove",
    "MetricBelow",
    "MongotorchError",
    "Move",
    "Never",
    "NewDocuments",
    "Passed",
    "Query",
    "Schedule",
    "Scores",
    "Settings",
    "Split",
    "State",
    "TorchModel",
    "TorchTrainer",
    "Trigger",
    "Validation",
    "Verdict",
    "Worker",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
