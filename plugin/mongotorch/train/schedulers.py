"""Makes learning rate schedulers by name and options, and lets those of a continued run go on.

A value of the options may name a number of the run, alone or in a formula: `"max_iterations"`,
`"max_iterations // 10"`. Schedulers that hold others get them as `{"schedulers": [{"cls": "LinearLR", ...}, …]}`.
"""

from __future__ import annotations

import ast
import inspect
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from mongotorch.codecs import resolve_in
from mongotorch.errors import CodecError, ParameterError

NUMBERS: Final = ("max_iterations", "max_epochs", "steps_per_epoch")
"""The numbers of a run that an option can name: optimizer steps and epochs at most, and steps in an epoch."""
INTERVALS: Final = ("step", "epoch", "validation")
_NAMED = re.compile(rf"\b(?:{'|'.join(NUMBERS)})\b")
_OPERATIONS: Final[Mapping[type, Callable[[Any, Any], Any]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
# What the states of schedulers hold besides counters: options under other names, and rates, which follow them.
_NOT_COUNTED: Final = frozenset(
    {"base_lrs", "_last_lr", "min_lrs", "default_min_lr", "max_lrs", "mode_worse", "total_steps", "verbose"}
    | {"total_size", "step_ratio", "_schedule_phases", "_milestones", "_schedulers", "lr_lambdas", "use_beta1"}
    | {"base_momentums", "max_momentums", "_scale_mode", "_scale_fn_ref", "_scale_fn_custom", "_anneal_func_type"}
)


def run_numbers(
    batches: Any, *, max_iterations: int, max_epochs: int | None, batches_per_step: int, is_weighted: bool
) -> dict[str, int]:
    """The numbers of a run, by name.

    Args:
        batches: Its training batches, which know how many an epoch has.
        max_iterations: The most optimizer steps.
        max_epochs: The most epochs; None: as many as the steps need.
        batches_per_step: How many batches a step has; the last one of an epoch may have fewer.
        is_weighted: Whether epochs differ in length, which `batches.lengths` tells.

    Raises:
        LengthUnknownError: The batches do not know it.
    """
    steps = -(-len(batches) // batches_per_step)
    epochs = max_epochs or -(-max_iterations // steps)
    whole = epochs * steps
    if is_weighted:
        whole = sum(-(-count // batches_per_step) for count in batches.lengths(epochs))
    return {"max_iterations": min(max_iterations, whole), "max_epochs": epochs, "steps_per_epoch": steps}


def scheduler_maker(given: Any) -> Callable[..., Any]:
    """The class or function of a scheduler.

    Args:
        given: A name in `torch.optim.lr_scheduler`, `package.module:Name`, or the class or function itself.

    Raises:
        ParameterError: There is none.
    """
    found: Any = given
    if isinstance(given, str):
        try:
            found = resolve_in(lr_scheduler, given)
        except CodecError as error:
            raise ParameterError(f"scheduler_cls={given!r}: {error.message}", field="scheduler_cls") from error
    is_class = isinstance(found, type)
    if (is_class and not issubclass(found, LRScheduler)) or not callable(found) or found is LRScheduler:
        raise ParameterError(
            f"scheduler_cls={given!r} is no scheduler; use a name in torch.optim.lr_scheduler (OneCycleLR, "
            'CosineAnnealingLR, …), "package.module:Class", or the class itself',
            field="scheduler_cls",
        )
    made: Callable[..., Any] = found
    return made


def is_plateau(given: Any) -> bool:
    """Whether a scheduler, or the class or name of one, waits for a measured value."""
    if isinstance(given, LRScheduler):
        return isinstance(given, ReduceLROnPlateau)
    made = scheduler_maker(given)
    return isinstance(made, type) and issubclass(made, ReduceLROnPlateau)


def make_scheduler(given: Any, options: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> LRScheduler:
    """A scheduler of an optimizer, with those that it holds.

    Args:
        given: As in `scheduler_maker`.
        options: Its options; those of the inner ones, with their `cls`, are the list `schedulers`.
        optimizer: Whose rates it changes.

    Raises:
        ParameterError: It does not exist, or refuses its options.
    """
    make, options = scheduler_maker(given), dict(options)
    if "schedulers" in options:
        options["schedulers"] = [_inner(part, optimizer) for part in _parts(options["schedulers"])]
    name = scheduler_name(make)
    try:
        made = make(optimizer=optimizer, **options)
    except ParameterError:
        raise
    except Exception as error:  # what a scheduler says to its options; torch has no one type for it
        raise ParameterError(f"{name} refuses scheduler_kwargs: {error}", field="scheduler_kwargs") from error
    if not isinstance(made, LRScheduler):
        raise ParameterError(f"{name} gave a {type(made).__name__}, which is no scheduler", field="scheduler_cls")
    return made


def _parts(given: Any) -> Sequence[Mapping[str, Any]]:
    if (
        isinstance(given, list | tuple)
        and given
        and all(isinstance(part, Mapping) and "cls" in part for part in given)
    ):
        return given
    raise ParameterError(
        'scheduler_kwargs: "schedulers" must be a list of dicts such as {"cls": "LinearLR", "total_iters": 100}',
        field="scheduler_kwargs",
    )


def _inner(part: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> LRScheduler:
    return make_scheduler(part["cls"], {name: value for name, value in part.items() if name != "cls"}, optimizer)


def scheduler_name(made: Any) -> str:
    """The name of a scheduler, of its class, or of the function that makes one."""
    return made if isinstance(made, str) else str(getattr(made, "__qualname__", type(made).__name__))


def named_numbers(options: Any) -> set[str]:
    """The numbers of a run that options name."""
    if isinstance(options, str):
        return set(_NAMED.findall(options))
    parts = options.values() if isinstance(options, Mapping) else options
    return set().union(*map(named_numbers, parts)) if isinstance(options, Mapping | list | tuple) else set()


def filled(options: Any, numbers: Mapping[str, int]) -> Any:
    """Options with the numbers of a run in place of their names; a formula becomes a whole number, rounded down.

    Raises:
        ParameterError: A formula has anything but these names, numbers, `+ - * / //` and parentheses.
    """
    if isinstance(options, str):
        return _computed(options, numbers) if _NAMED.search(options) else options
    if isinstance(options, Mapping):
        return {name: filled(value, numbers) for name, value in options.items()}
    if isinstance(options, list | tuple):
        return [filled(value, numbers) for value in options]
    return options


def _computed(text: str, numbers: Mapping[str, int]) -> int:
    try:
        return math.floor(_value(ast.parse(text.strip(), mode="eval").body, numbers))
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, OverflowError) as error:
        raise ParameterError(
            f"scheduler_kwargs: {text!r} is no formula of numbers, {', '.join(NUMBERS)} and + - * / // ({error})",
            field="scheduler_kwargs",
        ) from error


def _value(node: ast.AST, numbers: Mapping[str, int]) -> float:
    match node:
        case ast.Name(id=name) if name in numbers:
            return numbers[name]
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, numbers)
        case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _OPERATIONS:
            found: float = _OPERATIONS[type(operation)](_value(left, numbers), _value(right, numbers))
            return found
    raise ValueError(f"{ast.unparse(node)} is none of these")


def check_scheduler(given: Any, options: Mapping[str, Any], interval: str | None, *, groups: bool) -> None:
    """Refuse a scheduler that does not exist or does not take its options.

    Args:
        given: As in `scheduler_maker`.
        options: Its options.
        interval: When it makes a step; None is its default.
        groups: Whether there may be several parameter groups: only the first step tells then whether a list of
            rates has the right length.

    Raises:
        ParameterError: `field` names the parameter.
    """
    if is_plateau(given) and interval not in (None, "validation"):
        raise ParameterError(
            f'scheduler_interval={interval!r}: {scheduler_name(given)} needs a measured value; use "validation"',
            field="scheduler_interval",
        )
    numbers = {"steps_per_epoch": 10**6, "max_epochs": 10**3, "max_iterations": 10**9}
    options = filled(options, numbers)
    if not groups:
        weight = nn.Parameter(torch.zeros(1))
        make_scheduler(given, options, torch.optim.SGD([weight], lr=0.1, momentum=0.9))


def go_on(scheduler: LRScheduler, state: Mapping[str, Any]) -> None:
    """Give a new scheduler the counters of an earlier run; its options stay.

    Args:
        scheduler: The scheduler.
        state: The `state_dict` of one of the same class.
    """
    classes: Any = type(scheduler).__mro__
    options = {name for cls in classes for name in inspect.signature(cls.__init__).parameters}
    for name in set(scheduler.state_dict()) & set(state) - (options - {"last_epoch"}) - _NOT_COUNTED:
        setattr(scheduler, name, state[name])
    inner = state.get("_schedulers") or ()
    for part, kept in zip(getattr(scheduler, "_schedulers", ()), inner, strict=False):
        go_on(part, kept)


def set_rates(scheduler: LRScheduler, rates: Sequence[float]) -> None:
    """Let a scheduler go on from the rates of its groups."""
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler._last_lr = list(rates)
    for part in getattr(scheduler, "_schedulers", ()):
        part._last_lr = list(rates)
