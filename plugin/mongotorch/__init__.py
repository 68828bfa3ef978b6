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
        Every,
        Job,
        MetricAbove,
        MetricBelow,
        Never,
        NewDocuments,
        Schedule,
        Worker,
    )
    from mongotorch.settings import Settings
    from mongotorch.store import Move
    from mongotorch.train import Dataset, Metric, TorchModel, TorchTrainer, Validation
    from mongotorch.wiring.collection import Collection
    from mongotorch.wiring.live import Live

_HOMES = {
    "AllOf": "mongotorch.run",
    "Always": "mongotorch.run",
    "AnyOf": "mongotorch.run",
    "Better": "mongotorch.run",
    "Changed": "mongotorch.run",
    "Collection": "mongotorch.wiring.collection",
    "Component": "mongotorch.component",
    "Cron": "mongotorch.run",
    "Datalayer": "mongotorch.datalayer",
    "Dataset": "mongotorch.train",
    "Every": "mongotorch.run",
    "Job": "mongotorch.run",
    "Live": "mongotorch.wiring.live",
    "Metric": "mongotorch.train",
    "MetricAbove": "mongotorch.run",
    "MetricBelow": "mongotorch.run",
    "MongotorchError": "mongotorch.errors",
    "Move": "mongotorch.store",
    "Never": "mongotorch.run",
    "NewDocuments": "mongotorch.run",
    "Query": "mongotorch.query",
    "Schedule": "mongotorch.run",
    "Settings": "mongotorch.settings",
    "TorchModel": "mongotorch.train",
    "TorchTrainer": "mongotorch.train",
    "Validation": "mongotorch.train",
    "Worker": "mongotorch.run",
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
    "Every",
    "Job",
    "Live",
    "Metric",
    "MetricAbove",
    "MetricBelow",
    "MongotorchError",
    "Move",
    "Never",
    "NewDocuments",
    "Query",
    "Schedule",
    "Settings",
    "TorchModel",
    "TorchTrainer",
    "Validation",
    "Worker",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
