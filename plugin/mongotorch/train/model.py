"""Defines the TorchModel: a torch module as a component, how it predicts, its device and its random numbers.

Guarantees: predicting is done in `eval()` mode without gradients, and leaves the module in the mode it was in; one
item is a batch of one. A device that is named and missing is an error, never silently another one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mongotorch.component import ADDED, Component
from mongotorch.errors import ParameterError
from mongotorch.notebook import html_table
from mongotorch.tensors import copied_values, leaves, stack_inputs, to_device, unstack
from mongotorch.train.metrics import Validation

CALL = "__call__"
TRAINER = "trainer"
"""The `preprocess` of a model that gets its inputs as the validations of its trainer do."""


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class TorchModel(Component):
    """A torch module as a component.

    Args:
        identifier: Its name.
        db: The datalayer that `apply()` uses; never stored.
        uuid: The identity of the version it becomes; made when none is given.
        artifacts: `{field: codec name}`, over the default choice of codec.
        object: The `torch.nn.Module`.
        trainer: What trains it when it is applied; None applies it as it is.
        validation: What is measured besides the objective, and on which further datasets.
        preprocess: Turns an item into what the module takes, without the batch dimension; None takes it as it is.
            `"trainer"`: what the trainer's `valid_transform`, else its `transform`, makes of the item, without the
            target. The item is what the trainer's `key` cuts from a document, without the target too.
        postprocess: Turns the output for one item into what `predict` returns; None returns it as it is.
        forward_method: The method of `object` that predicts.
        train_forward_method: The method of `object` that trains; another than `__call__` receives the whole batch.
        preferred_devices: Devices in order of preference; the first that is there is used.
        eval_modules: Names of submodules that stay in `eval()` mode while the rest is trained. None: those that
            are in it when a run starts, where the module as a whole is not; a run publishes their names.

    Raises:
        IdentifierError: The identifier is none.
        ParameterError: Another argument cannot be used; `field` names it.
    """

    type_id: ClassVar[str] = "model"

    object: nn.Module
    trainer: Any = None  # a TorchTrainer, whose module imports this one
    validation: Validation | None = None
    preprocess: Callable[[Any], Any] | Literal["trainer"] | None = None
    postprocess: Callable[[Any], Any] | None = None
    forward_method: str = CALL
    train_forward_method: str = CALL
    preferred_devices: Sequence[str] = ("cuda", "mps", "cpu")
    eval_modules: Sequence[str] | None = dataclasses.field(default=None, metadata={ADDED: "0.2.0"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.object, nn.Module):
            raise ParameterError(
                f"object is a {type(self.object).__name__}; it must be a torch.nn.Module", field="object"
            )
        if self.preprocess is not None and self.preprocess != TRAINER and not callable(self.preprocess):
            raise ParameterError('preprocess must be a function, "trainer" or None', field="preprocess")
        if self.postprocess is not None and not callable(self.postprocess):
            raise ParameterError("postprocess must be a function or None", field="postprocess")
        for field in ("forward_method", "train_forward_method"):
            _check_method(field, getattr(self, field), self.object)
        if self.trainer is not None and getattr(self.trainer, "type_id", None) != "trainer":
            raise ParameterError("trainer must be a trainer component or None", field="trainer")
        if self.validation is not None and not isinstance(self.validation, Validation):
            raise ParameterError("validation must be a Validation or None", field="validation")
        _check_names("preferred_devices", self.preferred_devices)
        _check_names("eval_modules", () if self.eval_modules is None else self.eval_modules)
        pick_device(self.preferred_devices)
        unknown = sorted(set(self.eval_modules or ()) - {name for name, _ in self.object.named_modules()})
        if unknown:
            raise ParameterError(f"eval_modules: the module has no {unknown}", field="eval_modules")

    @property
    def takes_batch(self) -> bool:
        """Whether the training method receives the whole batch, the target included."""
        return self.train_forward_method != CALL

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the module."""
        return self.object.parameters()

    def start_training(self) -> tuple[str, ...]:
        """Put the module into `train()` mode, but for what stays in `eval()`.

        Returns:
            The names of the submodules that stay in `eval()`.
        """
        parts = dict(self.object.named_modules())
        if self.eval_modules is not None:
            kept = tuple(self.eval_modules)
        else:
            # A module that is in `eval()` as a whole was loaded so; that says nothing of its parts.
            kept = tuple(name for name, part in parts.items() if self.object.training and not part.training)
        self.object.train()
        for name in kept:
            parts[name].training = False
        return kept

    def train_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's training method returns."""
        return getattr(self.object, self.train_forward_method)(*args, **kwargs)

    def predict(self, x: Any) -> Any:
        """The prediction for one item.

        Args:
            x: What `preprocess` takes; without one: a tensor, array, number or list without the batch
                dimension, a tuple of them (positional arguments), or a dict of them (arguments by name).

        Returns:
            What `postprocess` makes of the output of shape (...), without the batch dimension.
        """
        return self.predict_batches([x])[0]

    def predict_batches(self, items: Sequence[Any], *, batch_size: int = 256) -> list[Any]:
        """The predictions for many items, in their order.

        Args:
            items: Each as in `predict`.
            batch_size: Items that go through the module at once.

        Raises:
            ShapeError: Items that cannot be stacked, or an output without a batch dimension.
            ParameterError: The batch size is below 1.
        """
        if batch_size < 1:
            raise ParameterError(f"batch_size={batch_size!r}: it must be 1 or more", field="batch_size")
        device = pick_device(self.preferred_devices)
        self.object.to(device)
        found: list[Any] = []
        with evaluating(self.object):
            for first in range(0, len(items), batch_size):
                part = items[first : first + batch_size]
                prepared = [self._prepared(item) for item in part]
                try:
                    output = self._forward(to_device(stack_inputs(prepared), device))
                except Exception as error:
                    self._explain(error)
                    raise
                found.extend(unstack(to_device(output, torch.device("cpu")), len(part)))
        return [self.postprocess(one) for one in found] if self.postprocess is not None else found

    def _prepared(self, item: Any) -> Any:
        if callable(self.preprocess):
            return self.preprocess(item)
        if self.preprocess is None:
            return item
        if self.trainer is None:
            raise ParameterError(
                'preprocess="trainer": no trainer has published this version of the model; load one that was '
                "trained, or give it a function of the inputs",
                field="preprocess",
            )
        return self.trainer.served_input(self, item)

    def _explain(self, error: Exception) -> None:
        """Let the error of an input that does not fit say that training changed its inputs, where it did."""
        names = ("collate_fn", "valid_transform", "transform")
        changed = next((name for name in names if getattr(self.trainer, name, None) is not None), None)
        if self.preprocess is None and changed is not None:
            same = "" if changed == "collate_fn" else ', or preprocess="trainer", which does what its trainer did'
            error.add_note(
                f"model {self.identifier!r} was trained on what {changed} of its trainer makes of a sample, and "
                "has no preprocess: it takes items as they are; give it a function that makes an input of an item"
                f"{same}"
            )

    def _forward(self, batch: Any) -> Any:
        method = getattr(self.object, self.forward_method)
        if isinstance(batch, tuple):
            return method(*batch)
        return method(**batch) if isinstance(batch, Mapping) else method(batch)


def _check_method(field: str, name: Any, module: nn.Module) -> None:
    if not isinstance(name, str) or not callable(getattr(module, name, None)):
        raise ParameterError(f"{field}={name!r}: {type(module).__name__} has no such method", field=field)


def _check_names(field: str, names: Any) -> None:
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ParameterError(f"{field}={names!r}: it must be a list of names", field=field)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into `eval()` mode without gradients inside; each submodule gets its mode back afterwards."""
    training = [part for part in module.modules() if part.training]
    if training:
        module.eval()
    try:
        # Not `inference_mode`: what a module caches in it could never be trained with.
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True


def copied_state(module: nn.Module) -> dict[str, Any]:
    """A copy of the module's state that later steps do not change, `get_extra_state` included."""
    # Of its own type: its attributes say of which version the state of each part is. Without them some parts, such
    # as quantised layers, take it for an old one.
    copied: dict[str, Any] = copied_values(module.state_dict())
    return copied


def pick_device(preferred: Sequence[str]) -> torch.device:
    """The first of these devices that is there.

    Args:
        preferred: Names such as `cuda`, `cuda:1`, `mps`, `cpu`.

    Raises:
        ParameterError: Torch knows no such name, or none of the devices is there.
    """
    names = [preferred] if isinstance(preferred, str) else list(preferred)
    for name in names:
        if _is_there(_device(name, "preferred_devices")):
            return torch.device(name)
    raise ParameterError(f"none of the devices {names} is there; add 'cpu'", field="preferred_devices")


def training_device(compute_kwargs: Mapping[str, Any] | None, preferred: Sequence[str]) -> torch.device:
    """The device that `compute_kwargs` names, else the first preferred one that is there.

    Raises:
        ParameterError: Torch knows no such name, or the device is not there.
    """
    name = (compute_kwargs or {}).get("device")
    if not name:
        return pick_device(preferred)
    device = _device(name, "compute_kwargs")
    if not _is_there(device):
        raise ParameterError(f"compute_kwargs: the device {name!r} is not there", field="compute_kwargs")
    return device


def _device(name: str, field: str) -> torch.device:
    try:
        return torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ParameterError(f"{name!r} is no device that torch knows", field=field) from error


def _is_there(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    if device.type == "mps":
        return torch.backends.mps.is_available()
    return device.type == "cpu"


def same_structure(model: TorchModel, other: TorchModel) -> bool:
    """Whether the weights of one model fit into the other: the same names, shapes and dtypes."""
    return _structure(model) == _structure(other)


def _structure(model: TorchModel) -> dict[str, tuple[Any, ...]]:
    state = model.object.state_dict()
    return {
        name: (tuple(getattr(part, "shape", ())), str(getattr(part, "dtype", type(part))))
        for name, part in state.items()
    }


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """One layer of a model: a part without parts, or with parameters of its own.

    Attributes:
        name: Its name in the module; empty for the module itself.
        kind: The name of its class.
        output: The shape of what it gave for a batch; None where that is not known.
        parameters: How many numbers its own parameters have; 0 as long as a lazy one has no shape.
        trainable: How many of them are trained.
        shapes: The shapes of its own parameters, by name.
    """

    name: str
    kind: str
    output: tuple[int, ...] | None
    parameters: int
    trainable: int
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def is_frozen(self) -> bool:
        """Whether it has parameters, and none of them is trained."""
        return bool(self.parameters) and not self.trainable


@final
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class ModelSummary:
    """The layers of a model; its `repr` is a table.

    Attributes:
        identifier: The name of the model.
        layers: The layers, in the order of the module.
        parameters: How many numbers all parameters have, shared ones once.
        trainable: How many of them are trained.
        bytes: What parameters and buffers take in memory.
    """

    identifier: str
    layers: tuple[LayerSummary, ...]
    parameters: int
    trainable: int
    bytes: int

    def rows(self) -> list[tuple[str, ...]]:
        """The lines of the table as text: layer, class, weights, output, parameters, and whether it is frozen."""
        return [
            (
                layer.name or "(itself)",
                layer.kind,
                ", ".join(f"{name} {_shape(shape)}" for name, shape in layer.shapes.items()),
                "" if layer.output is None else _shape(layer.output),
                f"{layer.parameters:,}" if layer.parameters else "",
                "frozen" if layer.is_frozen else "",
            )
            for layer in self.layers
        ]

    def __repr__(self) -> str:
        lines = [("layer", "class", "weights", "output", "parameters", ""), *self.rows()]
        widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([self._title(), *(line.rstrip() for line in table)])

    def _repr_html_(self) -> str:
        return html_table(self._title(), ("layer", "class", "weights", "output", "parameters", ""), self.rows())

    def _title(self) -> str:
        frozen = self.parameters - self.trainable
        return (
            f"model {self.identifier!r}: {self.parameters:,} parameters, {frozen:,} of them frozen, "
            f"{self.bytes / 2**20:,.1f} MiB"
        )


def summarize(model: TorchModel, run: Callable[[], Any] | None = None) -> ModelSummary:
    """The layers of a model.

    Args:
        model: The model.
        run: Passes a batch through it, by which the shapes of outputs are known; None leaves them out.
    """
    module, outputs = model.object, dict[str, tuple[int, ...]]()
    if run is not None:
        with contextlib.ExitStack() as hooks:
            for name, part in module.named_modules():
                handle = part.register_forward_hook(functools.partial(_keep_shape, outputs, name))
                hooks.callback(handle.remove)
            run()
    layers = [
        _layer(name, part, outputs.get(name))
        for name, part in module.named_modules()
        if not any(True for _ in part.children()) or any(True for _ in part.parameters(recurse=False))
    ]
    parameters = [part for part in module.parameters() if not is_lazy(part)]
    buffers = [part for part in module.buffers() if not is_lazy(part)]
    return ModelSummary(
        identifier=model.identifier,
        layers=tuple(layers),
        parameters=sum(part.numel() for part in parameters),
        trainable=sum(part.numel() for part in parameters if part.requires_grad),
        bytes=sum(part.nbytes for part in [*parameters, *buffers]),
    )


def _keep_shape(outputs: dict[str, tuple[int, ...]], name: str, _: nn.Module, __: Any, output: Any) -> None:
    first = next((part for part in leaves(output) if isinstance(part, Tensor)), None)
    if first is not None:
        outputs.setdefault(name, tuple(first.shape))


def _layer(name: str, part: nn.Module, output: tuple[int, ...] | None) -> LayerSummary:
    own = {one: value for one, value in part.named_parameters(recurse=False) if not is_lazy(value)}
    return LayerSummary(
        name=name,
        kind=type(part).__name__,
        output=output,
        parameters=sum(value.numel() for value in own.values()),
        trainable=sum(value.numel() for value in own.values() if value.requires_grad),
        shapes={one: tuple(value.shape) for one, value in own.items()},
    )


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "()"


def check_state_is_taken(module: nn.Module) -> None:
    """Refuse a module that does not take its own state back: it could not be given the best weights either.

    Raises:
        ParameterError: It does not; a lazy module, which has no state before its first batch, is not tried.
    """
    if any(is_lazy(part) for part in (*module.parameters(), *module.buffers())):
        return
    try:
        module.load_state_dict(copied_state(module))
    except Exception as error:  # a module's own code can raise anything
        raise ParameterError(
            f"the module does not take back what its state_dict() gives ({type(error).__name__}: {error}), so "
            "the weights of its best validation could not be restored; register what it cannot load with "
            "persistent=False, or keep it as a plain attribute",
            field="object",
        ) from error


def check_compile(options: Any) -> None:
    """Refuse options that `torch.compile` does not have. Raises: ParameterError."""
    if isinstance(options, bool):
        return
    known = set(inspect.signature(torch.compile).parameters) - {"model"}
    if not isinstance(options, Mapping) or set(options) - known:
        raise ParameterError(
            f"compile={options!r}: it must be True, False or a dict of {', '.join(sorted(known))}", field="compile"
        )


@contextlib.contextmanager
def compiled(model: TorchModel, options: bool | Mapping[str, Any]) -> Iterator[None]:
    """Let a model's training method be compiled inside; names of the module's state stay what they are.

    Args:
        model: The model.
        options: Those of `torch.compile`, or True for its defaults; False compiles nothing.
    """
    if options is False:
        yield
        return
    module, name = model.object, model.train_forward_method
    # What `module.compile()` sets, in place: a wrapped module would have other names in its state.
    name = "_compiled_call_impl" if name == CALL else name
    function = module._call_impl if name == "_compiled_call_impl" else getattr(module, name)
    before = vars(module).get(name)
    vars(module)[name] = torch.compile(function, **({} if options is True else options))
    try:
        yield
    finally:
        vars(module).pop(name)
        if before is not None:
            vars(module)[name] = before
