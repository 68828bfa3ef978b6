"""Finds the tensors and modules that an objective holds, in a partial, a closure or an object, say.

`map_contained` replaces them, `on_device` moves them, and `Contained` gives their parameters and their state.

Guarantees: a function or object is not changed; where something in it is replaced, it is rebuilt.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from mongotorch.component import Component
from mongotorch.tensors import copied_values, map_tensors

_MOST_DEEP: Final = 8
_MOST_PARTS: Final = 10_000


def map_contained(value: Any, tensor: Callable[[Tensor], Any], module: Callable[[nn.Module], Any]) -> Any:
    """The same function or object with functions applied to the tensors and modules that it holds.

    It is looked into partials, closures, default arguments, bound methods, attributes and containers, eight deep,
    and at 10,000 things at most.

    Args:
        value: An objective, say. It is not changed: where something in it is replaced, it is rebuilt.
        tensor: Applied to tensors and parameters.
        module: Applied to modules.
    """
    return _Walk(tensor, module).mapped(value, 0)


@final
class _Walk:
    """One walk of `map_contained`, which comes to everything once."""

    def __init__(self, tensor: Callable[[Tensor], Any], module: Callable[[nn.Module], Any]) -> None:
        self._tensor, self._module = tensor, module
        self._seen: dict[int, tuple[Any, Any]] = {}  # with what it was found for, which so keeps its id

    def mapped(self, value: Any, deep: int) -> Any:
        if value is None or isinstance(value, str | bytes | int | float | type):
            return value
        if id(value) in self._seen:
            return self._seen[id(value)][1]
        if deep > _MOST_DEEP or len(self._seen) > _MOST_PARTS:
            return value
        self._seen[id(value)] = (value, value)  # what refers to itself is not followed again
        result = self._mapped(value, lambda part: self.mapped(part, deep + 1))
        self._seen[id(value)] = (value, result)
        return result

    def _mapped(self, value: Any, inside: Callable[[Any], Any]) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, functools.partial):
            parts = [value.func, value.args, value.keywords]
            made = [inside(part) for part in parts]
            return value if _are_same(made, parts) else functools.partial(made[0], *made[1], **made[2])
        if isinstance(value, list | tuple | Mapping):
            parts = list(value.values()) if isinstance(value, Mapping) else list(value)
            same = _are_same([inside(part) for part in parts], parts)
            return value if same else map_tensors(inside, value, inside)
        if isinstance(value, types.MethodType):
            owner = inside(value.__self__)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if isinstance(value, types.FunctionType):
            return _map_function(value, inside)
        return _map_attributes(value, inside)


def _are_same(first: Sequence[Any], second: Sequence[Any]) -> bool:
    return all(one is other for one, other in zip(first, second, strict=True))


def _map_function(function: types.FunctionType, inside: Callable[[Any], Any]) -> Any:
    parts = [_content(cell) for cell in function.__closure__ or ()]
    made = [inside(part) for part in parts]
    defaults, named = inside(function.__defaults__), inside(function.__kwdefaults__)
    if _are_same([*made, defaults, named], [*parts, function.__defaults__, function.__kwdefaults__]):
        return function
    closure = tuple(
        cell if new is old else types.CellType(new)
        for cell, new, old in zip(function.__closure__ or (), made, parts, strict=True)
    )
    rebuilt: Any = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, defaults, closure
    )
    rebuilt.__kwdefaults__ = named
    functools.update_wrapper(rebuilt, function)
    del rebuilt.__wrapped__  # it holds what was replaced
    return rebuilt


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was assigned yet
        return None


def _map_attributes(value: Any, inside: Callable[[Any], Any]) -> Any:
    attributes = getattr(value, "__dict__", None)
    if not isinstance(attributes, dict) or isinstance(value, type | types.ModuleType | Component):
        return value
    made = {name: inside(part) for name, part in attributes.items() if part is not value}
    changed = {name: part for name, part in made.items() if part is not attributes[name]}
    if not changed:
        return value
    rebuilt = copy.copy(value)
    for name, part in changed.items():
        object.__setattr__(rebuilt, name, part)
    return rebuilt


def on_device(value: Any, device: torch.device) -> Any:
    """A function or object with the tensors that it holds on a device; modules and parameters move in place."""
    return map_contained(value, lambda tensor: _moved(tensor, device), lambda module: module.to(device))


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    moved = tensor.to(device)
    if isinstance(tensor, nn.Parameter) and moved is not tensor:
        tensor.data = moved.detach()  # an optimizer has this object
        return tensor
    return moved


@final
class Contained:
    """The modules and parameters that a function or object holds.

    Args:
        value: The function or object.
    """

    def __init__(self, value: Any) -> None:
        self.modules: list[nn.Module] = []
        self._parameters: list[nn.Parameter] = []
        map_contained(value, self._take, self._take)

    def _take(self, part: Any) -> Any:
        if isinstance(part, nn.Module) and not any(part is one for one in self.modules):
            self.modules.append(part)
        elif isinstance(part, nn.Parameter) and not any(part is one for one in self._parameters):
            self._parameters.append(part)
        return part

    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters, by names of their own; those of a single module by the names that it gives."""
        several = len(self.modules) > 1
        named = {
            f"{n}.{name}" if several else name: parameter
            for n, module in enumerate(self.modules)
            for name, parameter in module.named_parameters()
        }
        return named | {f"parameter {n}": parameter for n, parameter in enumerate(self._parameters)}

    def shapes(self) -> dict[str, Any]:
        """The shapes of the parameters that want a gradient, with the number of modules; empty without any."""
        named = self.parameters().items()
        found: dict[str, Any] = {name: part.shape for name, part in named if part.requires_grad}
        return {**found, "": len(self.modules)} if found else {}

    def state_dict(self) -> dict[str, Any]:
        """The states of the modules, without frozen parameters, and the parameters."""
        frozen = [{n for n, p in module.named_parameters() if not p.requires_grad} for module in self.modules]
        states = [
            {name: part for name, part in module.state_dict().items() if name not in left_out}
            for module, left_out in zip(self.modules, frozen, strict=True)
        ]
        return {"modules": states, "parameters": [parameter.data for parameter in self._parameters]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of the same modules."""
        for module, part in zip(self.modules, state["modules"], strict=True):
            module.load_state_dict(copied_values(part), strict=False)
        for parameter, value in zip(self._parameters, state["parameters"], strict=True):
            parameter.data.copy_(value)
