"""Holds everything that says how a model is trained, as one frozen value: the `TorchTrainer`.

A subclass changes training by its methods `take_step`, `get_optimizers` and `compute_validation_objective`; the
loop around them stays.

Guarantees: what can be known to be wrong without data is refused at construction; a trainer holds no database and
no open resource.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mongotorch.component import ADDED, Component
from mongotorch.errors import OptimizerError, ParameterError
from mongotorch.loader_options import check_trainer_loader
from mongotorch.query import Query
from mongotorch.signature import OBJECTIVE, Key, check_defaults, check_dtypes, check_signature
from mongotorch.split import Fold, Split, as_split
from mongotorch.train.contained import Contained, map_contained, on_device
from mongotorch.train.mapping import BatchMapping, Passed, check_key, counted_share, scalar
from mongotorch.train.model import TorchModel, evaluating
from mongotorch.train.optimizers import check_optimizer, check_state, make_optimizer
from mongotorch.train.step import TrainingStep

UNLIMITED = 10**100
COMPUTE_OPTIONS = frozenset({"device", "num_workers"})


def check_compute(options: Mapping[str, Any]) -> None:
    """Refuse options that no compute engine reads. Raises: ParameterError."""
    unknown = sorted(set(options) - COMPUTE_OPTIONS)
    if unknown:
        known = ", ".join(sorted(COMPUTE_OPTIONS))
        raise ParameterError(f"compute_kwargs: {unknown} are not known; known are {known}", field="compute_kwargs")
    workers = options.get("num_workers", 0)
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise ParameterError(f"compute_kwargs: num_workers={workers!r} must be 0 or more", field="compute_kwargs")
    device = options.get("device", "cpu")
    if not isinstance(device, str):
        raise ParameterError(f"compute_kwargs: device={device!r} must be a name", field="compute_kwargs")


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class TorchTrainer(TrainingStep, Component):
    """How a model is trained out of a select.

    Args:
        identifier: Its name.
        db: The datalayer that `apply()` uses; never stored.
        uuid: The identity of the version it becomes; made when none is given.
        artifacts: `{field: codec name}`, over the default choice of codec.
        key: The fields of a sample: `"x"`, `("x", "y")`, `{"field": "argument"}` or
            `(["x"], {"field": "argument"})`.
        select: The documents; the fold is added to it.
        transform: Applied to each sample before it is batched; called by `signature`.
        metric_values: `{metric: [one value per validation]}`; a run appends to it.
        signature: How a sample goes into `transform` and a batch into the model: `*args`, `**kwargs`,
            `*args,**kwargs` or `singleton`.
        data_prefetch: Read ahead in the background while streaming.
        prefetch_size: Documents read at a time.
        prefetch_factor: How many times `prefetch_size` documents may be held ready.
        in_memory: Read the select once into memory.
        compute_kwargs: For the compute engine: `device`, `num_workers`.
        objective: From output and target to a scalar tensor; lower is better.
        loader_kwargs: Those of `torch.utils.data.DataLoader`; `batch_size` is 1 unless given.
        max_iterations: The most optimizer steps; exactly so many are made unless the run stops early.
        no_improve_then_stop: Validations in a row without a better `listen` after which the run stops.
        download: With `in_memory=False`: read the select once into memory-mapped files on local disk.
        validation_interval: Steps between validations; there is one after the last step too. None never validates.
        listen: `objective`, or the name of a metric (`dataset/metric` for one on a dataset).
        optimizer_cls: A name in `torch.optim`, or `package.module:Class`.
        optimizer_kwargs: Its options.
        optimizer_state: What an earlier run of the same optimizer learned (moments, step counters), loaded before
            the first step; the options stay those of `optimizer_kwargs`. A run stores that of the published
            weights. None starts anew.
        collate_fn: Makes a batch of a list of samples; None stacks them.
        model: The model it trains when it is applied itself.
        seed: Seeds everything random: the order of the data, dropout, and what workers draw.
        defaults: `{field: value}`, such as `{"age": float("nan")}`, of documents that lack the field or have null.
        dtypes: `{field: dtype}`, such as `{"x": "float32"}`. Other fields have the dtype that a sample of the
            documents says: torch's default dtype where there is a float, else int64 or bool; arrays keep theirs.
        split: Which documents are for training and which for validation: `ByHash`, `ByTime`, `ByGroup`, `KFold`,
            or the share for validation, such as 0.1. None is by `_fold`, and by the hash of `_id` (5 % are for
            validation) for documents without.
        log_interval: Steps between two rows of `train` in what `db.metrics` gives; None keeps validations alone.

    Raises:
        IdentifierError, SignatureError, OptimizerError, LoaderOptionError: The argument of that name.
        ParameterError: Another argument cannot be used; `field` names it.
    """

    type_id: ClassVar[str] = "trainer"

    key: Any
    select: Query
    transform: Callable[..., Any] | None = None
    metric_values: Mapping[str, Sequence[float]] | None = None
    signature: str = "*args"
    data_prefetch: bool = False
    prefetch_size: int = 1000
    prefetch_factor: int = 100
    in_memory: bool = True
    compute_kwargs: Mapping[str, Any] | None = None
    objective: Callable[..., Tensor]
    loader_kwargs: Mapping[str, Any] | None = None
    max_iterations: int = UNLIMITED
    no_improve_then_stop: int = 5
    download: bool = False
    validation_interval: int | None = 100
    listen: str = OBJECTIVE
    optimizer_cls: str = "Adam"
    optimizer_kwargs: Mapping[str, Any] | None = None
    optimizer_state: Mapping[str, Any] | None = None
    collate_fn: Callable[[list[Any]], Any] | None = None
    model: TorchModel | None = None
    seed: int = 0
    defaults: Mapping[str, Any] | None = dataclasses.field(default=None, metadata={ADDED: "0.2.0"})
    dtypes: Mapping[str, str] | None = dataclasses.field(default=None, metadata={ADDED: "0.2.0"})
    split: Split | float | None = dataclasses.field(default=None, metadata={ADDED: "0.2.0"})
    log_interval: int | None = dataclasses.field(default=50, metadata={ADDED: "0.2.0"})

    def __post_init__(self) -> None:
        super().__post_init__()
        key = Key.parse(self.key)
        check_signature(self.signature)
        check_dtypes(self.dtypes, key.paths)
        if self.split is not None:
            as_split(self.split)
        check_defaults(self.defaults, key.paths)
        self._check_types()
        self._check_numbers()
        check_compute(self.compute_kwargs or {})
        check_trainer_loader(self.loader_kwargs or {}, workers=(self.compute_kwargs or {}).get("num_workers"))
        check_optimizer(self.optimizer_cls, self.optimizer_kwargs or {})
        if self.optimizer_state is not None and type(self).get_optimizers is TorchTrainer.get_optimizers:
            check_state(self.optimizer_cls, self.optimizer_kwargs or {}, self.optimizer_state)
        if self.optimizer_cls == "LBFGS" and type(self).take_step is TorchTrainer.take_step:
            raise OptimizerError(
                "LBFGS evaluates the objective several times a step; override take_step, and return "
                "optimizers[0].step(closure) from it, where closure clears the gradients, computes "
                "self.compute_objective(model, batch), calls backward() on that and returns it",
                field="optimizer_cls",
            )
        if self.model is not None:
            self.check_model(self.model, key)

    def check_model(self, model: TorchModel, key: Key | None = None) -> None:
        """Refuse a model that does not go with this trainer.

        Raises:
            SignatureError: The key has no input or no target.
            ParameterError: `listen` is nothing that the model's validation measures.
        """
        if self.transform is None and self.collate_fn is None:
            check_key(key or Key.parse(self.key), self.signature, takes_batch=model.takes_batch)
        validation = model.validation
        known = self.listen == OBJECTIVE or (
            validation is not None and validation.higher_is_better(self.listen) is not None
        )
        if not known:
            raise ParameterError(
                f"listen={self.listen!r} is not measured; use {OBJECTIVE!r} or a metric of the model's validation",
                field="listen",
            )

    def fold(self, name: Fold) -> Query:
        """The documents of its select that are in a fold of its split."""
        return self.select.fold(name, split=self.split)

    @functools.cached_property
    def mapping(self) -> BatchMapping:
        """How a batch goes through a model; made once, since every step uses it."""
        return BatchMapping(key=Key.parse(self.key), signature=self.signature, objective=self.objective)

    def forward(self, model: TorchModel, batch: Any) -> Passed:
        """Run the model on a batch; the result holds the objective's arguments. Raises: SignatureError."""
        return self.mapping(model, batch)

    def compute_objective(self, model: TorchModel, batch: Any) -> Tensor:
        """The objective of a batch, a scalar tensor with its graph.

        Raises:
            SignatureError: The batch does not have the structure that the signature needs.
            ParameterError: The objective gave no scalar, or one without a graph.
        """
        loss = scalar(self.forward(model, batch).into(self.objective))
        if not loss.requires_grad:
            raise ParameterError(
                "objective gave a number that depends on no weight; do not detach what it is computed from, "
                "and leave some parameter of the model with requires_grad=True",
                field="objective",
            )
        return loss

    def get_optimizers(self, model: TorchModel) -> Sequence[torch.optim.Optimizer]:
        """The optimizers of a run, made once before the first step. Raises: OptimizerError."""
        try:
            return (make_optimizer(self.optimizer_cls, model.parameters(), self.optimizer_kwargs or {}),)
        except OptimizerError as error:  # the options were tried at construction: it is the parameters
            raise OptimizerError(
                f"{self.optimizer_cls} does not take the parameters of the model ({error.__cause__ or error}); "
                "override get_optimizers, and give each optimizer those that it takes",
                field="optimizer_cls",
            ) from error

    def compute_validation_objective(self, model: TorchModel, passed: Passed) -> Tensor:  # noqa: ARG002
        """What a validation measures as `objective` of one batch; batches are averaged by their samples.

        Args:
            model: The model, in `eval()` mode, without gradients.
            passed: What the model made of the batch: the objective's arguments.
        """
        loss: Tensor = passed.into(self.objective)
        return loss

    def counted_share(self, passed: Passed) -> float:
        """The share of a batch's targets that its objective is a mean over; 1 unless it leaves some out.

        Known are `cross_entropy` and `nll_loss`, which leave out `ignore_index` and weigh classes.
        """
        if type(self).compute_validation_objective is not TorchTrainer.compute_validation_objective:
            return 1.0
        return counted_share(self.objective, passed)

    def _check_types(self) -> None:
        if not isinstance(self.select, Query):
            raise ParameterError('select must be a query, such as db["name"].find()', field="select")
        if not callable(self.objective):
            raise ParameterError("objective must be a function that gives a scalar tensor", field="objective")
        for field in ("transform", "collate_fn"):
            if getattr(self, field) is not None and not callable(getattr(self, field)):
                raise ParameterError(f"{field} must be a function or None", field=field)
        for field in ("data_prefetch", "in_memory", "download"):
            if not isinstance(getattr(self, field), bool):
                raise ParameterError(f"{field}={getattr(self, field)!r}: True or False", field=field)
        mappings = ("metric_values", "compute_kwargs", "loader_kwargs", "optimizer_kwargs", "optimizer_state")
        for field in mappings:
            if getattr(self, field) is not None and not isinstance(getattr(self, field), Mapping):
                raise ParameterError(f"{field} must be a dict or None", field=field)
        if self.model is not None and not isinstance(self.model, TorchModel):
            raise ParameterError("model must be a TorchModel or None", field="model")

    def _check_numbers(self) -> None:
        for name, values in (self.metric_values or {}).items():
            if not isinstance(name, str) or not isinstance(values, list | tuple):
                raise ParameterError("metric_values maps names to lists of numbers", field="metric_values")
        for field in ("prefetch_size", "prefetch_factor", "max_iterations", "no_improve_then_stop"):
            _check_positive(field, getattr(self, field))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ParameterError(f"seed={self.seed!r}: it must be a whole number", field="seed")
        if self.log_interval is not None:
            _check_positive("log_interval", self.log_interval)
        if self.validation_interval is not None:
            _check_positive("validation_interval", self.validation_interval)
        elif self.max_iterations >= UNLIMITED:
            raise ParameterError(
                "validation_interval=None never stops early; give a finite max_iterations",
                field="max_iterations",
            )


def _check_positive(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ParameterError(f"{field}={value!r}: it must be a whole number from 1 on", field=field)


def trainer_and_model(component: Component) -> tuple[TorchTrainer, TorchModel]:
    """The trainer and the model of a component that can be trained: a trainer with a model, or the reverse.

    Raises:
        ParameterError: It is a trainer without a model, or a model without a trainer.
    """
    trainer = component if isinstance(component, TorchTrainer) else getattr(component, "trainer", None)
    model = component if isinstance(component, TorchModel) else getattr(component, "model", None)
    if not isinstance(trainer, TorchTrainer) or not isinstance(model, TorchModel):
        raise ParameterError(
            f"{component!r} cannot be trained: a trainer needs a `model`, a model needs a `trainer`", field="model"
        )
    return trainer, model


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
    if isinstance(before, TorchTrainer):
        for name in learned_fields(trainer, before):
            # In place: what is published of a field that nothing trains is what was stored.
            Contained(getattr(trainer, name)).load_state_dict(Contained(getattr(before, name)).state_dict())
    if not isinstance(before, TorchTrainer) or before.optimizer_state is None:
        return trainer
    if before.optimizer_cls != trainer.optimizer_cls:
        return trainer
    return trainer.replace(uuid=trainer.uuid, optimizer_state=before.optimizer_state)


def trainer_on_device(trainer: TorchTrainer, device: torch.device) -> TorchTrainer:
    """The trainer with what its objective, and the fields of its subclass, hold on a device; else the same."""
    moved = {name: on_device(getattr(trainer, name), device) for name in parameter_fields(trainer)}
    return _changed(trainer, {name: value for name, value in moved.items() if value is not getattr(trainer, name)})


def _changed(trainer: TorchTrainer, fields: Mapping[str, Any]) -> TorchTrainer:
    """A copy of a trainer, its uuid and attributes included, with other fields; itself without any."""
    if not fields:
        return trainer
    made = copy.copy(trainer)
    made.__dict__.pop("mapping", None)  # it holds the objective
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def parameter_fields(trainer: TorchTrainer) -> list[str]:
    """The fields that may hold parameters: the objective, and those of a subclass."""
    own = [field.name for field in dataclasses.fields(trainer) if field.name not in SETTINGS]
    return ["objective", *own]


def learned_fields(trainer: TorchTrainer, other: TorchTrainer) -> list[str]:
    """The fields in which both trainers hold parameters that want a gradient, of the same names and shapes."""
    found = []
    for name in parameter_fields(trainer):
        one, two = (Contained(getattr(each, name, None)).shapes() for each in (trainer, other))
        if one and one == two:
            found.append(name)
    return found


def trainer_of(model: TorchModel, trainer: TorchTrainer) -> TorchTrainer:
    """A trainer whose objective, and own fields, hold the parameters that were published with a model."""
    own = model.trainer
    if not isinstance(own, TorchTrainer) or own is trainer:
        return trainer
    fields = {}
    for name in learned_fields(trainer, own):
        if getattr(own, name) is not getattr(trainer, name):
            fields[name] = map_contained(getattr(trainer, name), copy.deepcopy, copy.deepcopy)
            Contained(fields[name]).load_state_dict(Contained(getattr(own, name)).state_dict())
    return _changed(trainer, fields)


@contextlib.contextmanager
def evaluating_all(trainer: TorchTrainer, model: TorchModel) -> Iterator[None]:
    """As `evaluating`, for the module of a model and for those that the objective and a subclass's fields hold."""
    with contextlib.ExitStack() as entered:
        entered.enter_context(evaluating(model.object))
        for name in parameter_fields(trainer):
            for module in Contained(getattr(trainer, name)).modules:
                entered.enter_context(evaluating(module))
        yield


SETTINGS = frozenset({field.name for field in dataclasses.fields(TorchTrainer)})
"""The fields of a trainer without those of a subclass."""
