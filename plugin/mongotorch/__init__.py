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
    from mongotorch.run import Job, Worker
    from mongotorch.settings import Settings
    from mongotorch.train import Dataset, Metric, TorchModel, TorchTrainer, Validation
    from mongotorch.wiring.collection import Collection

_HOMES = {
    "Collection": "mongotorch.wiring.collection",
    "Component": "mongotorch.component",
    "Datalayer": "mongotorch.datalayer",
    "Dataset": "mongotorch.train",
    "Job": "mongotorch.run",
    "Metric": "mongotorch.train",
    "MongotorchError": "mongotorch.errors",
    "Query": "mongotorch.query",
    "Settings": "mongotorch.settings",
    "TorchModel": "mongotorch.train",
    "TorchTrainer": "mongotorch.train",
    "Validation": "mongotorch.train",
    "Worker": "mongotorch.run",
}

__all__ = [
    "Collection",
    "Component",
    "Datalayer",
    "Dataset",
    "Job",
    "Metric",
    "MongotorchError",
    "Query",
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
