"""Batches to a trained model: what a model and a trainer are, how a step is taken, how tensors are stored.

Always: nothing here knows a database; batches come in, and what happened comes out.
"""

from mongotorch.train.evaluation import Scored, evaluate, score
from mongotorch.train.loop import Batches, Event, Fit, Stepped, Trained, Validated
from mongotorch.train.metrics import Dataset, Metric, Validation
from mongotorch.train.model import TorchModel
from mongotorch.train.optimizer_state import differing, is_alike, warmed
from mongotorch.train.tensor_codec import fill_module
from mongotorch.train.trainer import TorchTrainer

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
