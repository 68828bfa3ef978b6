"""Finds what a run learns or counts outside the weights and the optimizers, for checkpoints and for publication.

A loss with parameters, a scheduler that a subclass of the trainer keeps, a counter or a cache of a module:
`ExtraState` saves what has a state, and `Unsaved` finds what has none.

Guarantees: a part with `state_dict` and `load_state_dict` comes back in a resumed run as it was. Looking at a
module leaves nothing behind in it.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor, nn

from mongotorch.component import Component
from mongotorch.tensors import copied_values, differences, map_contained, to_device
from mongotorch.train.generators import seeded
from mongotorch.train.mapping import scalar
from mongotorch.train.model import TorchModel
from mongotorch.train.optimizers import Contained
from mongotorch.train.trainer import SETTINGS, TorchTrainer, evaluating_all, parameter_fields

_log = logging.getLogger("mongotorch")
_MOST_DEEP: Final = 4
_MOST_ITEMS: Final = 1000
_MOST_TRIED: Final = 16
_OF_TRAINERS: Final = SETTINGS | {"mapping", "lanes", "_trained"}
_OF_MODELS: Final = frozenset({field.name for field in dataclasses.fields(TorchModel)} | {"_trained"})
_OF_MODULES: Final = frozenset(vars(nn.Module()))


@final
class ExtraState:
    """What of a run has a state besides the model and the optimizers.

    These are the objects with `state_dict` and `load_state_dict` that are attributes of the trainer, the model,
    its submodules and the optimizers (alone, or in a list, tuple or dict), and the modules and parameters that
    the objective and the fields of a trainer's subclass hold.

    Args:
        trainer: The trainer of the run.
        model: The model of the run.
        optimizers: The optimizers of the run.
    """

    def __init__(
        self, trainer: TorchTrainer, model: TorchModel, optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        self._trainer, self._model, self._optimizers = trainer, model, optimizers
        self._contained = {name: Contained(getattr(trainer, name)) for name in parameter_fields(trainer)}

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state of each part, by name."""
        return {name: copied_values(part.state_dict()) for name, part in self._parts().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Give the parts their states; the names of those that are not there."""
        parts = self._parts()
        for name, part in parts.items():
            if name in state:
                part.load_state_dict(copied_values(state[name]))
        return sorted(set(state) - set(parts))

    def learned(self) -> dict[str, Any]:
        """A copy of what the optimizers train besides the model, by the field of the trainer that holds it."""
        return {name: copied_values(self._contained[name].state_dict()) for name in self.trained_fields()}

    def load_learned(self, state: Mapping[str, Any]) -> None:
        """Take over what `learned` gave."""
        for name, part in state.items():
            self._contained[name].load_state_dict(part)

    def trained_fields(self) -> list[str]:
        """The fields of the trainer that hold parameters which an optimizer trains."""
        trained = self._trained()
        return [
            name
            for name, contained in self._contained.items()
            if any(id(parameter) in trained for parameter in contained.parameters().values())
        ]

    def untrained(self) -> list[str]:
        """The names of the objective's parameters that want a gradient and that no optimizer has."""
        trained = self._trained()
        named = self._contained["objective"].parameters().items()
        return [name for name, parameter in named if parameter.requires_grad and id(parameter) not in trained]

    def published_fields(self, trainer: TorchTrainer) -> dict[str, Any]:
        """The trained fields of a trainer as new objects on the CPU, which hold the parameters as they are now."""
        cpu = torch.device("cpu")

        def parameter(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                return tensor
            return nn.Parameter(tensor.detach().clone().to(cpu), requires_grad=tensor.requires_grad)

        def module(part: nn.Module) -> nn.Module:
            return copy.copy(part.to(cpu))

        return {
            name: map_contained(getattr(trainer, name), parameter, module, leave=Component)
            for name in self.trained_fields()
        }

    def _trained(self) -> set[int]:
        groups = (group for optimizer in self._optimizers for group in optimizer.param_groups)
        return {id(parameter) for group in groups for parameter in group["params"]}

    def _parts(self) -> dict[str, Any]:
        seen = {id(part) for part in (*self._optimizers, *self._model.object.modules())}
        found: dict[str, Any] = {}
        for name, contained in self._contained.items():
            if contained.parameters() or any(module.state_dict() for module in contained.modules):
                found[f"trainer.{name}"] = contained
            seen |= {id(module) for module in contained.modules}
        for name, value in self._attributes():
            for inner, part in _alone(name, value):
                if id(part) not in seen and _has_state(part):
                    seen.add(id(part))
                    found[inner] = part
        return found

    def _attributes(self) -> Iterator[tuple[str, Any]]:
        yield from _own(self._trainer, _OF_TRAINERS, "trainer")
        yield from _own(self._model, _OF_MODELS, "model")
        for name, module in self._model.object.named_modules():
            yield from _own(module, _OF_MODULES, f"model.object.{name}".rstrip("."))
        for n, optimizer in enumerate(self._optimizers):
            yield from _own(optimizer, frozenset({"state", "param_groups", "defaults"}), f"optimizers[{n}]")


def _own(value: Any, without: frozenset[str], name: str) -> Iterator[tuple[str, Any]]:
    for attribute, part in list(vars(value).items()):
        if attribute not in without:
            yield f"{name}.{attribute}", part


def _alone(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list | tuple):
        yield from ((f"{name}[{n}]", part) for n, part in enumerate(value))
    elif isinstance(value, dict):
        yield from ((f"{name}[{key!r}]", part) for key, part in list(value.items()))
    else:
        yield name, value


def _has_state(value: Any) -> bool:
    return not isinstance(value, type) and all(
        callable(getattr(value, method, None)) for method in ("state_dict", "load_state_dict")
    )


_MISSING: Final = object()


@final
class Unsaved:
    """What a run changes in its trainer and model and no state has: plain attributes and non-persistent buffers.

    Args:
        trainer: The trainer of the run.
        model: The model of the run.
    """

    def __init__(self, trainer: TorchTrainer, model: TorchModel) -> None:
        self._trainer, self._model = trainer, model
        self._first = self._now()

    def changes(self, *, modules_only: bool = False) -> dict[tuple[str, str], Any]:
        """Copies of what is not as it was at the start, by owner and attribute; `_MISSING` for what is gone."""
        now = self._now()
        return {
            key: now.get(key, _MISSING)
            for key in [*self._first, *(key for key in now if key not in self._first)]
            if not (modules_only and key[0] in ("trainer", "model"))
            and not _is_same(self._first.get(key, _MISSING), now.get(key, _MISSING))
        }

    def restore(self, changes: Mapping[tuple[str, str], Any], *, modules_only: bool = False) -> None:
        """Set everything to what it was at the start but for `changes`, which `changes()` gave."""
        for key in self.changes(modules_only=modules_only) | dict(changes):
            self._set(key, changes[key] if key in changes else self._first.get(key, _MISSING))

    def lost(self, state: Mapping[str, Any], measure: Callable[[], Sequence[float]]) -> list[str]:
        """The names of what a resumed run would not have, and of which something depends.

        Attributes of the trainer are named if they changed. Attributes and buffers of modules are named if the
        module's objective is another one with their first values: each is tried, of more than 16 none alone.

        Args:
            state: The module's state in the checkpoint.
            measure: Runs the module, and gives numbers that depend on it; it may change the module.
        """
        now = self.changes()
        if not now:
            return []
        owners = [key for key in now if key[0] in ("trainer", "model")]
        inner = [key for key in now if key not in owners]
        buffers = [(buffer, buffer.detach().clone()) for buffer in self._model.object.buffers()]

        def put_back() -> None:
            self.restore(now)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)

        try:
            if inner:
                inner = self._not_loaded(inner, state)
            if inner:
                inner = self._needed(inner, put_back, measure)
        finally:
            put_back()
        return [_name(key) for key in (*owners, *inner)]

    def _not_loaded(self, keys: list[tuple[str, str]], state: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Those that loading a state does not set, as `set_extra_state` may."""
        now = {key: self._now().get(key, _MISSING) for key in keys}
        for key in keys:
            self._set(key, self._first.get(key, _MISSING))
        self._model.object.load_state_dict(copied_values(state))
        loaded = self._now()
        return [key for key in keys if not _is_same(loaded.get(key, _MISSING), now[key])]

    def _needed(
        self,
        keys: list[tuple[str, str]],
        put_back: Callable[[], None],
        measure: Callable[[], Sequence[float]],
    ) -> list[tuple[str, str]]:
        def measured(first: Sequence[tuple[str, str]]) -> list[float]:
            put_back()
            for key in first:
                self._set(key, self._first.get(key, _MISSING))
            return list(measure())

        whole = measured([])
        if not whole or _is_same(measured(keys), whole):
            return [] if whole else keys
        if len(keys) > _MOST_TRIED:
            return keys
        return [key for key in keys if not _is_same(measured([key]), whole)] or keys

    def _owners(self) -> Iterator[tuple[str, Any, frozenset[str]]]:
        yield "trainer", self._trainer, _OF_TRAINERS
        yield "model", self._model, _OF_MODELS
        for name, module in self._model.object.named_modules():
            yield f"model.object.{name}".rstrip("."), module, _OF_MODULES

    def _now(self) -> dict[tuple[str, str], Any]:
        found: dict[tuple[str, str], Any] = {}
        for name, owner, without in self._owners():
            values = {key: value for key, value in vars(owner).items() if key not in without}
            if isinstance(owner, nn.Module):
                values |= {key: owner._buffers[key] for key in _unsaved_buffers(owner)}
            for key, value in values.items():
                try:
                    found[name, key] = _copy(value)
                except TypeError:
                    continue
        return found

    def _set(self, key: tuple[str, str], value: Any) -> None:
        owner = next(owner for name, owner, _ in self._owners() if name == key[0])
        attribute = key[1]
        if isinstance(owner, nn.Module):
            if attribute in _unsaved_buffers(owner):
                owner._buffers[attribute] = None if value is _MISSING else _copy(value)
                return
            if attribute in owner._parameters or attribute in owner._modules or attribute in owner._buffers:
                return  # made by a lazy module: the state has it
        if value is _MISSING:
            vars(owner).pop(attribute, None)
        else:
            vars(owner)[attribute] = _copy(value)


def objectives_of(trainer: TorchTrainer, model: TorchModel, batch: Any) -> list[float]:
    """The objective of a batch, in training and in validation mode; nothing where it has none."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def objective() -> float:
        passed = trainer.forward(model, to_device(copied_values(batch), device))
        return float(scalar(trainer.compute_validation_objective(model, passed)).detach())

    try:
        with seeded(trainer.seed), torch.no_grad():
            training = objective()
        with seeded(trainer.seed), evaluating_all(trainer, model):
            return [training, objective()]
    except Exception as error:  # noqa: BLE001 - a trainer with a step of its own need not have one
        _log.debug("the objective of a batch could not be measured: %s", error)
        return []


def _unsaved_buffers(module: nn.Module) -> set[str]:
    return set(getattr(module, "_non_persistent_buffers_set", ())) & set(module._buffers)


def _name(key: tuple[str, str]) -> str:
    return f"{key[0]}.{key[1]}"


def _copy(value: Any, deep: int = 0) -> Any:
    """A copy of a plain value, a tensor or a generator. Raises: TypeError for anything else."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return value
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if isinstance(value, np.ndarray | np.generic | np.random.Generator | random.Random):
        return copy.deepcopy(value)
    if type(value) in (list, tuple, dict, set, deque) and len(value) <= _MOST_ITEMS and deep < _MOST_DEEP:
        if isinstance(value, dict):
            return {key: _copy(part, deep + 1) for key, part in value.items()}
        return type(value)(_copy(part, deep + 1) for part in value)
    raise TypeError("changes of it cannot be found out")


def _is_same(first: Any, second: Any) -> bool:
    try:
        return not list(differences(_comparable(first), _comparable(second)))
    except Exception:  # noqa: BLE001 - what cannot be compared is not known to be the same
        return False


def _comparable(value: Any) -> Any:
    """What `differences` compares."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.shape, value.tobytes()]
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, float) and value != value:
        return repr(value)
    if isinstance(value, dict):
        return {key: _comparable(part) for key, part in value.items()}
    if isinstance(value, list | tuple | deque):
        return [_comparable(part) for part in value]
    return value
