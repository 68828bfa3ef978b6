"""Train PyTorch models where the data lives: the public face.

Always: importing this imports neither torch nor a driver; a name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mongotorch._version import __version__

if TYPE_CHECKING:
    from mongotorch.component import Component
    from mongotorch.datalayer import Datalayer
    from mongotorch.errors import MongotorchError
    from mongotorch.query import Query
    from mongotorch.run import (
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
        Job,
        MetricAbove,
        MetricBelow,
        Never,
        NewDocuments,
        Schedule,
        Scores,
        State,
        Trigger,
        Verdict,
        Worker,
    )
    from mongotorch.settings import Settings
    from mongotorch.store import Move
    from mongotorch.train import Dataset, Metric, TorchModel, TorchTrainer, Validation
    from mongotorch.train.mapping import Passed
    from mongotorch.wiring.collection import Collection
    from mongotorch.wiring.live import Live

# In `__all__`, and what records and pickles may name besides: such a name is kept for ever.
_HOMES = {
    "AllOf": "mongotorch.run",
    "Always": "mongotorch.run",
    "AnyOf": "mongotorch.run",
    "Asked": "mongotorch.run.gates",
    "Better": "mongotorch.run",
    "Changed": "mongotorch.run",
    "Collection": "mongotorch.wiring.collection",
    "Component": "mongotorch.component",
    "Cron": "mongotorch.run",
    "Datalayer": "mongotorch.datalayer",
    "Dataset": "mongotorch.train",
    "Decision": "mongotorch.run",
    "Engine": "mongotorch.run",
    "Every": "mongotorch.run",
    "Firing": "mongotorch.run",
    "Gate": "mongotorch.run",
    "Job": "mongotorch.run",
    "Key": "mongotorch.key",
    "Live": "mongotorch.wiring.live",
    "LocalEngine": "mongotorch.run",
    "Metric": "mongotorch.train",
    "MetricAbove": "mongotorch.run",
    "MetricBelow": "mongotorch.run",
    "MongotorchError": "mongotorch.errors",
    "Move": "mongotorch.store",
    "Never": "mongotorch.run",
    "NewDocuments": "mongotorch.run",
    "Passed": "mongotorch.train.mapping",
    "Query": "mongotorch.query",
    "QueueEngine": "mongotorch.run",
    "Schedule": "mongotorch.run",
    "Scores": "mongotorch.run",
    "Settings": "mongotorch.settings",
    "State": "mongotorch.run",
    "TorchModel": "mongotorch.train",
    "TorchTrainer": "mongotorch.train",
    "Trigger": "mongotorch.run",
    "Validation": "mongotorch.train",
    "Verdict": "mongotorch.run",
    "Waited": "mongotorch.run.triggers",
    "Worker": "mongotorch.run",
    "preview": "mongotorch.run",
}

__all__ = [
    "AllOf",
    "Always",
    "AnyOf",
    "Better",
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
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
