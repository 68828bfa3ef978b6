"""Starts a run from the weights and optimizer state of another, and compares two results of training.

Guarantees: what is continued is copied, and options that the trainer names (a learning rate) win over those that
the other run ended with. A comparison is of the tensors' memory: 0.0 and -0.0 differ, and a NaN equals itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mongotorch.tensors import copy_tensors
from mongotorch.train.model import TorchModel
from mongotorch.train.trainer import TorchTrainer


def same_structure(model: TorchModel, other: TorchModel) -> bool:
    """Whether the weights of one model fit into the other: the same names, shapes and dtypes."""
    return _structure(model) == _structure(other)


def warm_start(trainer: TorchTrainer, model: TorchModel, source: TorchModel) -> TorchTrainer:
    """Let a run start where the one that trained `source` ended.

    Args:
        trainer: How the run trains.
        model: What it trains; its weights become those of `source`, which must have the same structure.
        source: The trained model, with the trainer that was published with it.

    Returns:
        The trainer under the same uuid, with the other run's optimizer state where the optimizer's class is the
        same.
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
    new: dict[str, Any] = copy_tensors(state)
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


def differences(first: Any, second: Any, where: str = "") -> Iterator[str]:
    """The names of what differs in two modules, states, or structures of tensors and plain values.

    Args:
        first: One of them.
        second: The other.
        where: The name of the whole.
    """
    if isinstance(first, nn.Module) and isinstance(second, nn.Module):
        first, second = first.state_dict(), second.state_dict()
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if not _same_bits(first, second):
            yield where
    elif isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in dict.fromkeys([*first, *second]):
            name = f"{where}.{key}" if where else str(key)
            if key in first and key in second:
                yield from differences(first[key], second[key], name)
            else:
                yield name
    elif isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        for at, (one, other) in enumerate(zip(first, second, strict=True)):
            yield from differences(one, other, f"{where}[{at}]")
    elif type(first) is not type(second) or first != second:
        yield where


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    one, other = (part.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for part in (first, second))
    return torch.equal(one, other)
