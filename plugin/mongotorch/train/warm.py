"""To go on where another run ended: its weights, and the state of its optimizer.

Always: what is gone on with is copied into what was given to train, whose own options stay: a learning rate that
the trainer names counts over the one that the other run ended with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mongotorch.train.model import TorchModel
from mongotorch.train.optimizers import copied
from mongotorch.train.trainer import TorchTrainer


def is_alike(model: TorchModel, other: TorchModel) -> bool:
    """Whether the weights of one model fit into the other: the same names, shapes and dtypes."""
    return _structure(model) == _structure(other)


def warmed(trainer: TorchTrainer, model: TorchModel, source: TorchModel) -> TorchTrainer:
    """Let a run start where the one that trained `source` ended.

    Args:
        trainer: How the run trains.
        model: What it trains; its weights become those of `source`, which must be alike.
        source: The trained model, with the trainer that was published with it.

    Returns:
        The trainer, under the same uuid, with the state of the optimizer, where that was one of the same class.
    """
    model.object.load_state_dict(source.object.state_dict())
    before = source.trainer
    if not isinstance(before, TorchTrainer) or before.optimizer_state is None:
        return trainer
    if before.optimizer_cls != trainer.optimizer_cls:
        return trainer
    state = _with_options(before.optimizer_state, trainer.optimizer_kwargs or {})
    return trainer.replace(uuid=trainer.uuid, optimizer_state=state)


def _with_options(state: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The state of one or of several optimizers, with the options that are named now."""
    new: dict[str, Any] = copied(state)
    for one in new.get("optimizers", [new]):
        for group in one.get("param_groups", ()):
            group.update({name: value for name, value in options.items() if name in group})
    return new


def _structure(model: TorchModel) -> dict[str, tuple[Any, ...]]:
    state = model.object.state_dict()
    return {
        name: (tuple(getattr(part, "shape", ())), str(getattr(part, "dtype", type(part))))
        for name, part in state.items()
    }
