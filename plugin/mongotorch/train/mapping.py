"""Maps a batch into the model, and what comes out into the objective, by `signature`.

Guarantees: training and validation map a batch the same way; an error in a user's function says which one, and
what it was given.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from mongotorch.errors import MongotorchError, ParameterError, SignatureError, TransformError
from mongotorch.signature import Key, sample_caller
from mongotorch.tensors import map_tensors
from mongotorch.train.model import TRAINER, TorchModel

_MOST_DEEP: Final = 8
_MOST_PARTS: Final = 10_000
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@final
@dataclass(frozen=True, kw_only=True, init=False)
class Passed:
    """The arguments of the objective for one batch, after the model's forward pass.

    Attributes:
        args: Positional arguments; the first is the output, unless the training method returns a dict.
        kwargs: Arguments by name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __init__(self, *, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> None:
        # Half as long as what a frozen dataclass does; every step makes one.
        self.__dict__["args"] = args
        self.__dict__["kwargs"] = {} if kwargs is None else kwargs

    def into(self, function: Callable[..., Any], part: str = "the objective") -> Any:
        """Call a function with them.

        Args:
            function: What to call.
            part: Its name in errors.

        Raises:
            SignatureError: It does not take such arguments.
        """
        try:
            return function(*self.args, **self.kwargs)
        except Exception as error:
            explain(error, part, function, self.args, self.kwargs)
            raise

    def for_metrics(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a metric: `(output, target)` also where the one target has a name of its own."""
        if len(self.args) == 1 and len(self.kwargs) == 1:
            return (*self.args, *self.kwargs.values()), {}
        return self.args, self.kwargs


def mapped(passed: Passed, change: Callable[[Tensor], Tensor]) -> Passed:
    """The same arguments, with what a function makes of each tensor."""
    return Passed(args=map_tensors(change, passed.args), kwargs=map_tensors(change, passed.kwargs))


def one_row(passed: Passed, row: int, rows: int) -> Passed:
    """The arguments for one of so many rows: a batch of one."""
    return mapped(passed, lambda tensor: tensor[row : row + 1] if _has_rows(tensor, rows) else tensor)


def without_rows(passed: Passed, rows: int) -> list[Tensor]:
    """The tensors whose first dimension is not that of so many rows."""
    found: list[Tensor] = []

    def look(tensor: Tensor) -> Tensor:
        if not _has_rows(tensor, rows):
            found.append(tensor)
        return tensor

    mapped(passed, look)
    return found


def _has_rows(tensor: Tensor, rows: int) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == rows


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
        if self._is_plain and type(batch) is tuple and not model.takes_batch:
            return self._positional(model, batch)
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
            raise self._no_name(model, kwargs)
        return Passed(args=(self._forward(model, args, mine),), kwargs=rest)

    def input_key(self, model: TorchModel) -> Key | None:
        """The fields of the key that a model is given, without the targets; `predict` takes a sample of it.

        Returns:
            None where the key does not tell: the training method gets the whole batch or sample, or some inputs by
            name and others by position.
        """
        fields = self.key.fields
        if len(fields) == 1:
            return Key(form="single", positional=fields)
        if self.signature == "singleton" or model.takes_batch:
            return self.key if model.preprocess == TRAINER and not model.takes_batch else None
        if self.signature == "*args" or (self.signature == "*args,**kwargs" and not self.key.named):
            return Key(form="single" if len(fields) == 2 else "tuple", positional=fields[:-1])
        by_name = self.signature == "**kwargs"
        paths = dict(zip(self.key.names(), fields, strict=True)) if by_name else {n: p for p, n in self.key.named}
        named = tuple((path, name) for name, path in self._split(model, paths)[0].items())
        positional = () if by_name else self.key.positional
        if positional and named:
            return None
        if positional:
            return Key(form="single" if len(positional) == 1 else "tuple", positional=positional)
        if len(named) == 1 and callable(model.preprocess):  # which takes an item, and not an argument by name
            return Key(form="single", positional=(named[0][0],))
        return Key(form="dict", named=named) if named else None

    def served_input(self, model: TorchModel, item: Any, transform: Callable[..., Any] | None) -> Any:
        """The input that validations make of a sample, of an item that has no target: `preprocess="trainer"`.

        Args:
            model: What gets it.
            item: The value of the one input; a tuple of the values of several; where parts go by name a dict of
                those that there are; with `singleton` the whole sample.
            transform: What validations apply to a sample; it gets None in place of each target.

        Returns:
            A tuple of positional arguments, or a dict of arguments by name.

        Raises:
            ParameterError: The item has other parts, or the key does not say which of them are inputs.
            TransformError: `transform` raised, gave nothing, or made an input of the target.
            SignatureError: `transform` does not take the sample, or the model not what it made.
        """
        sample = self._sample_of(item)
        try:
            made = sample if transform is None else sample_caller(transform, self.key, self.signature)(sample)
        except MongotorchError:
            raise
        except Exception as error:
            raise TransformError(
                f"{_SERVED}: the trainer's transform failed ({type(error).__name__}: {error}); it gets None in "
                f"place of a target, so let it pass the target on as it is, {_OR_FUNCTION}",
                field="preprocess",
            ) from error
        args, kwargs = self._inputs(model, made)
        if args and kwargs:
            raise ParameterError(
                f"{_SERVED}: the model takes inputs by position and by name, and predict only one of both; "
                f"name all of them in `key`, {_OR_FUNCTION}",
                field="preprocess",
            )
        if any(part is None for part in (made, *args, *kwargs.values())):
            raise TransformError(
                f"{_SERVED}: an input is None, since it is made of a target, or transform gave nothing; let "
                f"transform make inputs of inputs alone, {_OR_FUNCTION}",
                field="preprocess",
            )
        return kwargs or tuple(args)

    def _no_name(self, model: TorchModel, kwargs: Mapping[str, Any]) -> SignatureError:
        takes, _ = _bound(model.object, (), {})
        return SignatureError(
            f"none of the names {sorted(kwargs)} is an argument of the model's forward{takes}; "
            "name them so in `key`, or in what transform returns",
            field="signature",
        )

    def _sample_of(self, item: Any) -> Any:
        """The sample of an item, with None in place of what it does not have."""
        key, names = self.key, self.key.names()
        if self.signature == "singleton" and len(names) > 1:
            return item
        is_named = self.signature == "**kwargs" or (bool(key.named) and self.signature != "*args")
        if len(names) == 1:
            values = {0: item}
        elif self.signature == "**kwargs" or (is_named and not key.positional):
            if not isinstance(item, Mapping) or not item or set(item) - set(names):
                raise ParameterError(
                    f"{_SERVED}: it takes a dict of {', '.join(map(repr, names))}, without the target, and got "
                    f"{_shown(item)}",
                    field="item",
                )
            values = {n: item[name] for n, name in enumerate(names) if name in item}
        else:
            count = len(key.positional) if is_named else len(names) - 1
            parts = (item,) if count == 1 else item
            if not isinstance(parts, tuple | list) or len(parts) != count:
                raise ParameterError(
                    f"{_SERVED}: it takes a tuple of {', '.join(map(repr, names[:count]))}, "
                    f"and got {_shown(item)}",
                    field="item",
                )
            values = dict(enumerate(parts))
        return key.arrange_parts([values.get(n) for n in range(len(names))])

    def _inputs(self, model: TorchModel, sample: Any) -> tuple[Sequence[Any], dict[str, Any]]:
        """What a model gets of a sample, as positional arguments and arguments by name, without the targets."""
        if self.signature == "singleton":
            return (sample,), {}
        args, kwargs = self._arguments(sample)
        if kwargs or self.signature == "**kwargs":
            mine = self._split(model, kwargs)[0]
            if not args and not mine:
                raise self._no_name(model, kwargs)
            return args, mine
        if len(args) < 2:
            raise SignatureError(
                f"{_SERVED}: signature {self.signature!r} needs an input and a target, and transform gave "
                f"{len(args)} part(s); let it pass the target on, {_OR_FUNCTION}",
                field="preprocess",
            )
        return args[:-1], {}

    @functools.cached_property
    def _is_plain(self) -> bool:
        """Whether a batch that is a tuple has the positional arguments of the model, and then the target."""
        return self.signature == "*args" and self.key.form != "both"

    def _forward(self, model: TorchModel, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        try:
            return getattr(model.object, model.train_forward_method)(*args, **kwargs)
        except Exception as error:
            name = model.train_forward_method if model.takes_batch else "forward"
            takes = getattr(model.object, name, model.object)
            explain(error, f"the model's {name}", takes, args, kwargs, hint=_HINTS[self.signature])
            raise

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


_SERVED: Final = 'preprocess="trainer"'
_OR_FUNCTION: Final = "or give the model a function of the inputs as `preprocess`"
_HINTS = {
    "singleton": "signature 'singleton' gives it the whole sample",
    "*args": "signature '*args' gives it every part of a sample but the last, which is the target; with several "
    "targets name them: signature='**kwargs'",
    "**kwargs": "signature '**kwargs' gives it the parts that it names",
    "*args,**kwargs": "signature '*args,**kwargs' gives it the positional parts and the named ones that it names",
}


def call(part: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a function of the user; see `explain` for its errors. Raises: SignatureError."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        explain(error, part, function, args, kwargs)
        raise


def explain(
    error: Exception,
    part: str,
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    hint: str = "",
) -> None:
    """Add to an error that a function of the user raised a note of what it was given; the error keeps its type.

    Args:
        error: What it raised. Errors of mongotorch say enough.
        part: What the function is.
        function: The function.
        args: Positional arguments that it was called with.
        kwargs: Arguments by name.
        hint: What decides the arguments, for the error about them.

    Raises:
        SignatureError: It does not take such arguments.
    """
    if isinstance(error, MongotorchError):
        return
    names, problem = _bound(function, args, kwargs)
    given = ", ".join([*map(_shown, args), *(f"{name}={_shown(value)}" for name, value in kwargs.items())])
    if isinstance(error, TypeError) and problem:
        hint = hint or "name the parts in `key` as it names its arguments, or use another `signature`"
        raise SignatureError(
            f"{part} takes {names} and was given ({given}): {problem}; {hint}", field="signature"
        ) from error
    error.add_note(f"in {part}{names}, given ({given})")
    if any(isinstance(value, Tensor) and value.dtype == torch.bool for value in [*args, *kwargs.values()]):
        error.add_note("one of these is bool, which few objectives take: convert it in `transform`")


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


def check_served(model: TorchModel, *, has_collate: bool) -> None:
    """Refuse a model that is to get its inputs from a trainer which does not make them one at a time.

    Args:
        model: The model.
        has_collate: Whether the trainer has a `collate_fn`.

    Raises:
        ParameterError: It does not.
    """
    if model.takes_batch or has_collate:
        why = f"{model.train_forward_method} gets the whole batch, and which part of it is the input is not known"
        if has_collate:
            why = "collate_fn makes batches of samples and their targets, and predict stacks single inputs"
        raise ParameterError(f"{_SERVED}: {why}; give the model a function of the inputs", field="preprocess")


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
    counts, weight = target != options.get("ignore_index", -100), options.get("weight")
    if weight is None:
        return int(torch.count_nonzero(counts)) / target.numel()
    return float(weight.to(target.device)[target[counts]].sum()) / target.numel()


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
