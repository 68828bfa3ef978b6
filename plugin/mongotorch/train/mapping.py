"""Maps a batch into the model, and what comes out into the objective, by `signature`.

`map_contained` and `Contained` walk through what an objective holds: a partial, a closure or an object, say.

Guarantees: training and validation map a batch the same way; an error in a user's function says which one, and
what it was given.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from mongotorch.component import Component
from mongotorch.errors import MongotorchError, ParameterError, SignatureError
from mongotorch.signature import Key
from mongotorch.tensors import copied_values, map_tensors
from mongotorch.train.model import TorchModel

_MOST_DEEP: Final = 8
_MOST_PARTS: Final = 10_000
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@final
@dataclass(frozen=True, kw_only=True)
class Passed:
    """The arguments of the objective for one batch, after the model's forward pass.

    Attributes:
        args: Positional arguments; the first is the output, unless the training method returns a dict.
        kwargs: Arguments by name.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def into(self, function: Callable[..., Any], part: str = "the objective") -> Any:
        """Call a function with them.

        Args:
            function: What to call.
            part: Its name in errors.

        Raises:
            SignatureError: It does not take such arguments.
        """
        return call(part, function, self.args, self.kwargs)

    def for_metrics(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a metric: `(output, target)` also where the one target has a name of its own."""
        if len(self.args) == 1 and len(self.kwargs) == 1:
            return (*self.args, *self.kwargs.values()), {}
        return self.args, self.kwargs


@final
@dataclass(frozen=True, kw_only=True)
class BatchMapping:
    """Runs a model on batches, for one key, signature and objective."""

    key: Key
    signature: str
    objective: Callable[..., Any]

    def __call__(self, model: TorchModel, batch: Any) -> Passed:
        """Run the model on a batch.

        Raises:
            SignatureError: The batch does not have the structure that the signature needs.
        """
        if self.signature == "singleton":
            return _as_arguments(self._forward(model, (batch,), {}), as_one=not model.takes_batch)
        args, kwargs = self._arguments(batch)
        if model.takes_batch:
            return _as_arguments(self._forward(model, args, kwargs), as_one=False)
        if self.signature == "*args":
            return self._positional(model, args)
        if self.signature == "*args,**kwargs" and not kwargs:
            return self._positional(model, args)
        mine, rest = self._split(model, kwargs)
        if not args and not mine:
            takes, _ = _bound(model.object, (), {})
            raise SignatureError(
                f"none of the names {sorted(kwargs)} is an argument of the model's forward{takes}; "
                "name them so in `key`, or in what transform returns",
                field="signature",
            )
        return Passed(args=(self._forward(model, args, mine),), kwargs=rest)

    def _forward(self, model: TorchModel, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        name = model.train_forward_method if model.takes_batch else "forward"
        takes = getattr(model.object, name, model.object)
        hint = _HINTS[self.signature]
        return call(f"the model's {name}", model.train_forward, args, kwargs, takes=takes, hint=hint)

    def _positional(self, model: TorchModel, args: Sequence[Any]) -> Passed:
        if len(args) < 2:
            raise SignatureError(
                f"signature {self.signature!r} needs an input and a target, and a batch has {len(args)} part(s); "
                "add the target to `key`, or use signature='singleton'",
                field="signature",
            )
        return Passed(args=(self._forward(model, args[:-1], {}), args[-1]))

    def _arguments(self, batch: Any) -> tuple[Sequence[Any], dict[str, Any]]:
        """The batch as positional arguments and arguments by name."""
        if self.signature == "*args":
            if isinstance(batch, Mapping):
                return list(batch.values()), {}
            if _is_pair(batch) and self.key.form == "both":
                return [*batch[0], *batch[1].values()], {}
            return (batch, {}) if isinstance(batch, list | tuple) else ([batch], {})
        if self.signature == "**kwargs":
            return [], self._by_name(batch)
        if _is_pair(batch):
            return batch[0], dict(batch[1])
        if isinstance(batch, Mapping):
            return [], dict(batch)
        return (batch, {}) if isinstance(batch, list | tuple) else ([batch], {})

    def _by_name(self, batch: Any) -> dict[str, Any]:
        if isinstance(batch, Mapping):
            return dict(batch)
        names = self.key.names()
        parts: list[Any] = list(batch) if isinstance(batch, list | tuple) else [batch]
        if _is_pair(batch) and self.key.form == "both":
            parts = [*batch[0], *batch[1].values()]
        if len(parts) != len(names):
            raise SignatureError(
                f"signature '**kwargs': a batch of {len(parts)} part(s) for the names {list(names)}; "
                "let transform return a dict",
                field="signature",
            )
        return dict(zip(names, parts, strict=True))

    def _split(self, model: TorchModel, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arguments of `forward`, and the rest, which is the objective's."""
        names, takes_any = _names(getattr(model.object, "forward", model.object))
        mine = {name for name in kwargs if name in names}
        if takes_any:  # **kwargs in forward takes what the objective does not ask for
            mine |= set(kwargs) - _names(getattr(self.objective, "forward", self.objective))[0]
        return (
            {name: value for name, value in kwargs.items() if name in mine},
            {name: value for name, value in kwargs.items() if name not in mine},
        )


_HINTS = {
    "singleton": "signature 'singleton' gives it the whole sample",
    "*args": "signature '*args' gives it every part of a sample but the last, which is the target; with several "
    "targets name them: signature='**kwargs'",
    "**kwargs": "signature '**kwargs' gives it the parts that it names",
    "*args,**kwargs": "signature '*args,**kwargs' gives it the positional parts and the named ones that it names",
}


def call(
    part: str,
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    takes: Callable[..., Any] | None = None,
    hint: str = "",
) -> Any:
    """Call a function of the user; an error of its own keeps its type, and gets a note of what it was given.

    Args:
        part: What the function is, for errors.
        function: What to call.
        args: Positional arguments.
        kwargs: Arguments by name.
        takes: The function whose arguments these are, where `function` only hands them on.
        hint: What decides the arguments, for the error about them.

    Raises:
        SignatureError: It does not take such arguments.
    """
    try:
        return function(*args, **kwargs)
    except MongotorchError:
        raise
    except Exception as error:
        names, problem = _bound(takes or function, args, kwargs)
        given = ", ".join([*map(_shown, args), *(f"{name}={_shown(value)}" for name, value in kwargs.items())])
        if isinstance(error, TypeError) and problem:
            hint = hint or "name the parts in `key` as it names its arguments, or use another `signature`"
            raise SignatureError(
                f"{part} takes {names} and was given ({given}): {problem}; {hint}", field="signature"
            ) from error
        error.add_note(f"in {part}{names}, given ({given})")
        if any(isinstance(value, Tensor) and value.dtype == torch.bool for value in [*args, *kwargs.values()]):
            error.add_note("one of these is bool, which few objectives take: convert it in `transform`")
        raise


def _bound(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, str]:
    """The arguments that a function takes, as text, and why these cannot be them; empty where nothing is known."""
    try:
        signature = inspect.signature(getattr(function, "forward", function))
    except (TypeError, ValueError):  # a builtin says nothing about its arguments
        return "", ""
    names = [str(p.replace(annotation=p.empty)) for p in signature.parameters.values() if p.default is p.empty]
    shown = f"({', '.join([*names, *(['...'] if len(names) < len(signature.parameters) else [])])})"
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return shown, str(error)
    return shown, ""


def _shown(value: Any) -> str:
    """A value by its type and shape alone: its content may be nobody else's business."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_shown(part)}' for name, part in value.items())}}}"
    if isinstance(value, list | tuple) and len(value) <= 8:
        return f"[{', '.join(map(_shown, value))}]"
    return type(value).__name__


def check_key(key: Key, signature: str, *, takes_batch: bool) -> None:
    """Refuse a key that cannot work with a signature where no transform changes the samples.

    Args:
        key: The fields of a sample.
        signature: A valid one.
        takes_batch: Whether the model's training method receives everything.

    Raises:
        SignatureError: There is no input, or no target.
    """
    if signature == "*args" and not takes_batch and len(key.fields) < 2:
        raise SignatureError(
            f"signature '*args' needs an input and a target, and the key has only {list(key.fields)}; "
            "add the target, or use signature='singleton'",
            field="signature",
        )


def counted_share(objective: Callable[..., Any], passed: Passed) -> float:
    """The share of its targets that an objective takes its mean over, classes weighted as it weighs them.

    Args:
        objective: `cross_entropy` or `nll_loss`, as functions, modules or partials of them; others count all.
        passed: The objective's arguments.

    Returns:
        1 where all count; 0 where every target is `ignore_index`.
    """
    options: dict[str, Any] = {}
    while isinstance(objective, functools.partial):
        options, objective = {**objective.keywords, **options}, objective.func
    if isinstance(objective, nn.CrossEntropyLoss | nn.NLLLoss):
        options = {name: getattr(objective, name) for name in ("weight", "ignore_index", "reduction")}
    elif objective not in (nn.functional.cross_entropy, nn.functional.nll_loss):
        return 1.0
    args, _ = passed.for_metrics()
    target = args[1] if len(args) > 1 else passed.kwargs.get("target")
    if not isinstance(target, Tensor) or target.is_floating_point() or not target.numel():
        return 1.0
    if options.get("reduction", "mean") != "mean":
        return 1.0
    counted = target[target != options.get("ignore_index", -100)]
    weight = options.get("weight")
    total = counted.numel() if weight is None else float(weight.to(target.device)[counted].sum())
    return total / target.numel()


def scalar(loss: Any) -> Tensor:
    """The value of an objective as a tensor of one element.

    Raises:
        ParameterError: It is neither a number nor a tensor of one element.
    """
    if isinstance(loss, int | float):
        return torch.tensor(float(loss))
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ParameterError(f"objective gave {what}; it must give a scalar tensor", field="objective")
    return loss


def _as_arguments(returned: Any, *, as_one: bool) -> Passed:
    if as_one:
        return Passed(args=(returned,))
    if isinstance(returned, Mapping):
        return Passed(kwargs=dict(returned))
    return Passed(args=tuple(returned) if isinstance(returned, tuple | list) else (returned,))


def _is_pair(batch: Any) -> bool:
    return (
        isinstance(batch, list | tuple)
        and len(batch) == 2
        and isinstance(batch[0], list | tuple)
        and isinstance(batch[1], Mapping)
    )


def _names(function: Callable[..., Any]) -> tuple[set[str], bool]:
    """The names of a function's arguments, and whether it takes `**kwargs`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin says nothing about its arguments
        return set(), False
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return {p.name for p in parameters if p.kind in _NAMED}, takes_any


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
