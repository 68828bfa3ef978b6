"""Batches to a trained model: what a model and a trainer are, how a step is taken, how tensors are stored.

Always: nothing here knows a database; batches come in, and what happened comes out.
"""

from __future__ import annotations

from mongotorch.train.codec import fill_module
from mongotorch.train.comparing import differing
from mongotorch.train.evaluation import evaluate
from mongotorch.train.loop import Batches, Event, Fit
from mongotorch.train.metrics import Dataset, Metric, Validation
from mongotorch.train.model import TorchModel
from mongotorch.train.progress import Stepped, Trained, Validated
from mongotorch.train.scoring import Scored, score
from mongotorch.train.trainer import TorchTrainer
from mongotorch.train.warm import is_alike, warmed

__all__ = [
    "Batches",
    "Dataset",
    "Event",
    "Fit",
    "Metric",
    "Scored",
    "Stepped",
    "TorchModel",
    "TorchTrainer",
    "Trained",
    "Validated",
    "Validation",
    "differing",
    "evaluate",
    "fill_module",
    "is_alike",
    "score",
    "warmed",
]
