"""Trains models: batches come in, events and a trained model come out; nothing here knows a database."""

from mongotorch.train.callbacks import Stepped, Trained, Validated
from mongotorch.train.evaluation import Scored, evaluate, score
from mongotorch.train.loop import Batches, Event, Fit
from mongotorch.train.metrics import Dataset, Metric, Validation
from mongotorch.train.model import (
    LayerSummary,
    ModelSummary,
    TorchModel,
    pick_device,
    same_structure,
    summarize,
    training_device,
)
from mongotorch.train.parallel import ALONE, Alone, Group, Lanes, ProcessGroup, first_rank, pinned_threads
from mongotorch.train.tensor_codec import fill_module
from mongotorch.train.trainer import TorchTrainer, trainer_and_model, warm_start

__all__ = [
    "ALONE",
    "Alone",
    "Batches",
    "Dataset",
    "Event",
    "Fit",
    "Group",
    "Lanes",
    "LayerSummary",
    "Metric",
    "ModelSummary",
    "ProcessGroup",
    "Scored",
    "Stepped",
    "TorchModel",
    "TorchTrainer",
    "Trained",
    "Validated",
    "Validation",
    "evaluate",
    "fill_module",
    "first_rank",
    "pick_device",
    "pinned_threads",
    "same_structure",
    "score",
    "summarize",
    "trainer_and_model",
    "training_device",
    "warm_start",
]
