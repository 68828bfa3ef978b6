"""Makes optimizers by name, checked before any data is read, and saves and loads their states.

The state of one optimizer is its `state_dict`, that of several is `{"optimizers": [state_dict, ...]}`.
`Contained` finds what may be trained besides the model: the modules and parameters that an objective holds.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from mongotorch.codecs import resolve_in
from mongotorch.component import Component
from mongotorch.errors import CodecError, OptimizerError
from mongotorch.tensors import copied_values, copy_tensors, map_contained

# What torch's optimizers hold in the shape of the parameter.
_PARAMETER_SHAPED = frozenset(
    {"acc_delta", "ax", "exp_avg", "exp_avg_sq", "exp_inf", "grad_avg", "max_exp_avg_sq", "momentum_buffer"}
    | {"prev", "square_avg", "sum"}
)
_CLASS = "optimizer"  # in a state: the name of the class whose state it is
# What groups hold besides options: their parameters, and what torch's schedulers write there.
_NOT_OPTIONS = frozenset(
    {"params", "param_names", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}
)


OptimizerName = str | type[torch.optim.Optimizer]
"""A name in `torch.optim`, such as `AdamW`, or `package.module:Class`, or the class itself."""


def optimizer_class(name: OptimizerName) -> type[torch.optim.Optimizer]:
    """The class of a name, or the class that is given.

    Raises:
        OptimizerError: There is none.
    """
    found: Any = name
    if isinstance(name, str):
        try:
            found = resolve_in(torch.optim, name)
        except CodecError as error:
            raise OptimizerError(f"optimizer_cls={name!r}: {error.message}", field="optimizer_cls") from error
    if not isinstance(found, type) or not issubclass(found, torch.optim.Optimizer):
        raise OptimizerError(
            f"optimizer_cls={name!r} is no optimizer; use a name in torch.optim (Adam, AdamW, SGD, …) "
            '"package.module:Class", or a class',
            field="optimizer_cls",
        )
    return found


def make_optimizer(
    name: OptimizerName, parameters: Iterable[Any], options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """An optimizer over parameters. Raises: OptimizerError when it refuses its options."""
    cls: Any = optimizer_class(name)
    try:
        made: torch.optim.Optimizer = cls(parameters, **options)
    except (TypeError, ValueError) as error:
        raise OptimizerError(
            f"{optimizer_name(cls)} refuses optimizer_kwargs: {error}", field="optimizer_kwargs"
        ) from error
    return made


def check_optimizer(name: OptimizerName, options: Mapping[str, Any]) -> None:
    """Refuse an optimizer that does not exist or does not take these options. Raises: OptimizerError."""
    make_optimizer(name, [nn.Parameter(torch.zeros(1, 1))], options)  # a matrix: Muon takes nothing else


def grouped_parameters(
    named: Iterable[tuple[str, nn.Parameter]],
    choose: Callable[[str, nn.Parameter], Mapping[str, Any] | None],
    known: Iterable[str],
) -> list[dict[str, Any]]:
    """The groups of an optimizer: parameters that get the same options are one group, in order of appearance.

    Args:
        named: The parameters.
        choose: From name and parameter to options; None leaves the parameter out.
        known: The options that the optimizer has.

    Raises:
        OptimizerError: It gives something else, or an option that the optimizer does not have, or leaves out all.
    """
    names, groups = set(known), list[tuple[dict[str, Any], list[nn.Parameter]]]()
    for name, parameter in named:
        try:
            options = choose(name, parameter)
        except Exception as error:
            error.add_note(f"in param_groups, for the parameter {name!r}")
            raise
        if options is None:
            continue
        if not isinstance(options, Mapping) or set(options) - names:
            raise OptimizerError(
                f"param_groups gave {options!r} for {name!r}; it must give None or a dict with some of "
                f"{', '.join(sorted(names))}",
                field="param_groups",
            )
        group = next((one for one in groups if one[0] == dict(options)), None)
        if group is None:
            groups.append(group := (dict(options), []))
        group[1].append(parameter)
    if not groups:
        raise OptimizerError("param_groups leaves out every parameter", field="param_groups")
    return [{"params": parameters, **options} for options, parameters in groups]


def optimizer_name(cls: type[torch.optim.Optimizer]) -> str:
    """The name of an optimizer's class as `optimizer_cls` takes it."""
    name: str = cls.__name__
    if getattr(torch.optim, name, None) is cls:
        return name
    return f"{cls.__module__}:{cls.__qualname__}"


def state_of(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """The state of optimizers, a copy that later steps do not change; each names its class as `optimizer`."""
    states = [{**copy_tensors(one.state_dict()), _CLASS: optimizer_name(type(one))} for one in optimizers]
    return states[0] if len(states) == 1 else {"optimizers": states}


def load_state(optimizers: Sequence[torch.optim.Optimizer], state: Mapping[str, Any]) -> None:
    """Give optimizers a whole state that `state_of` gave, options included: a run goes on where it stopped.

    Raises:
        OptimizerError: It is that of other optimizers, or of a model with other parameters.
    """
    for optimizer, one in zip(optimizers, _states(optimizers, state), strict=True):
        _load(optimizer, one)


def continue_from(optimizers: Sequence[torch.optim.Optimizer], state: Mapping[str, Any]) -> None:
    """Give new optimizers what an earlier run learned (moments, step counters); their own options stay.

    An option is what the class takes at construction: a learning rate, a weight decay. What an optimizer keeps in
    its groups besides, as an estimate that it updates, is state.

    Raises:
        OptimizerError: It is the state of other optimizers or groups, or of a model with other parameters.
    """
    for optimizer, one in zip(optimizers, _states(optimizers, state), strict=True):
        _check_class(optimizer, one)
        own, kept = optimizer.state_dict()["param_groups"], list(one.get("param_groups", ()))
        sizes = [[len(group.get("params", ())) for group in groups] for groups in (own, kept)]
        if sizes[0] != sizes[1]:
            raise OptimizerError(
                f"optimizer_state has groups of {sizes[1]} parameters, this run's optimizer has {sizes[0]}; "
                "give optimizer_state=None to start anew",
                field="optimizer_state",
            )
        # Of all base classes: one that takes `**kwargs` hands them on.
        classes: Any = type(optimizer).__mro__
        options = {name for cls in classes for name in inspect.signature(cls.__init__).parameters}
        groups = [
            {**new, **{name: old[name] for name in set(new) & set(old) - options}, "params": old["params"]}
            for new, old in zip(own, kept, strict=True)
        ]
        _load(optimizer, {"state": one.get("state", {}), "param_groups": groups})
        _follow_rate(optimizer)


def _follow_rate(optimizer: torch.optim.Optimizer) -> None:
    """Compute anew what a state holds of the rate: ASGD keeps the rate of its next step there."""
    if not isinstance(optimizer, torch.optim.ASGD):
        return
    for group in optimizer.param_groups:
        rate = float(group["lr"])
        for kept in (optimizer.state[parameter] for parameter in group["params"] if parameter in optimizer.state):
            kept["eta"].fill_(rate / (1 + group["lambd"] * rate * float(kept["step"])) ** group["alpha"])


def check_state(name: OptimizerName, options: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Refuse a state that is not that of one optimizer of this class. Raises: OptimizerError."""
    optimizer = make_optimizer(name, [nn.Parameter(torch.zeros(1, 1))], options)
    for one in _states([optimizer], state):
        _check_class(optimizer, one)


def _check_class(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    own = optimizer_name(type(optimizer))
    kept = state.get(_CLASS)
    if kept is None:  # torch's own state does not name its class: another one's options tell
        names = {name for group in state.get("param_groups", ()) for name in group}
        unknown = sorted(names - {name for group in optimizer.param_groups for name in group} - _NOT_OPTIONS)
        if not unknown:
            return
        kept = f"an optimizer with the options {', '.join(unknown)}"
    if kept != own:
        raise OptimizerError(
            f"optimizer_state is that of {kept}, and optimizer_cls is {own}; "
            "give optimizer_state=None to start anew",
            field="optimizer_state",
        )


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys()


def _states(optimizers: Sequence[torch.optim.Optimizer], state: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    states: Sequence[Mapping[str, Any]] = [state] if len(optimizers) == 1 else state.get("optimizers", [])
    if len(states) != len(optimizers) or not all(map(_is_state, states)):
        raise OptimizerError(
            f"optimizer_state is not that of {len(optimizers)} optimizer(s); "
            "give optimizer_state=None to start anew",
            field="optimizer_state",
        )
    return states


def _load(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    try:
        optimizer.load_state_dict(copy.deepcopy({name: part for name, part in state.items() if name != _CLASS}))
        _check_shapes(optimizer)
    except (KeyError, TypeError, ValueError) as error:
        raise OptimizerError(
            f"optimizer_state does not fit the model's parameters ({error}); "
            "give optimizer_state=None to start anew",
            field="optimizer_state",
        ) from error


def _check_shapes(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a state of other shapes: torch only counts parameters, and would fail in the first step."""
    for parameter, kept in optimizer.state.items():
        for name in _PARAMETER_SHAPED & set(kept):
            if isinstance(kept[name], Tensor) and kept[name].shape != parameter.shape:
                shapes = f"{tuple(kept[name].shape)} for a parameter of shape {tuple(parameter.shape)}"
                raise ValueError(f"{name!r} has shape {shapes}")


def on_device(value: Any, device: torch.device) -> Any:
    """A function or object with the tensors that it holds on a device; modules and parameters move in place."""
    return map_contained(
        value, lambda tensor: _moved(tensor, device), lambda module: module.to(device), leave=Component
    )


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
        map_contained(value, self._take, self._take, leave=Component)

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
