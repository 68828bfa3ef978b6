"""Holds everything that says how a model is trained, as one frozen value: the `TorchTrainer`.

A subclass changes training by its methods: `backward`, `update` or all of `take_step` (see `step.py`),
`get_optimizers`, `get_schedulers`, `compute_validation_objective` or all of `validate`. The loop around them
stays.

Guarantees: what can be known to be wrong without data is refused at construction; a trainer holds no database and
no open resource.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from mongotorch.codecs import PowerOfTen
from mongotorch.component import ADDED, Component
from mongotorch.errors import OptimizerError, ParameterError
from mongotorch.loader_options import check_trainer_loader
from mongotorch.query import Query
from mongotorch.signature import (
    OBJECTIVE,
    Key,
    check_defaults,
    check_dtypes,
    check_on_bad_document,
    check_sample_weight,
    check_signature,
    weighted_key,
)
from mongotorch.split import Fold, Split, as_split
from mongotorch.tensors import map_contained
from mongotorch.train.callbacks import check_callbacks
from mongotorch.train.mapping import BatchMapping, Passed, check_key, check_served, counted_share, scalar
from mongotorch.train.model import TRAINER, TorchModel, check_compile, evaluating
from mongotorch.train.optimizers import (
    Contained,
    check_optimizer,
    check_state,
    grouped_parameters,
    make_optimizer,
    on_device,
    optimizer_class,
    optimizer_name,
)
from mongotorch.train.parallel import Lanes, check_compute
from mongotorch.train.schedulers import INTERVALS, check_scheduler, is_plateau, make_scheduler, named_numbers
from mongotorch.train.step import PRECISIONS, TrainingStep, count_share, is_accumulating

UNLIMITED = PowerOfTen(10**100)
_PLAIN = Lanes()
_autocasting = TrainingStep.autocasting


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
        compute_kwargs: For the compute engine: `device`; `num_workers`, processes that read; `workers`, ranks that
            train together, a number or (least, most); `lanes`, a power of two, into which the rows of a step are
            cut whatever the workers (see `Lanes`); `reduce`, `exact` or `fast`; `resources` of a worker;
            `threads` that a worker computes with, 1 unless given where there are lanes.
        objective: From output and target to a scalar tensor; lower is better.
        loader_kwargs: Those of `torch.utils.data.DataLoader`; `batch_size` is 1 unless given.
        max_iterations: The most optimizer steps; exactly so many are made unless the run stops early.
        no_improve_then_stop: Validations in a row without a better `listen` after which the run stops.
        download: With `in_memory=False`: read the select once into memory-mapped files on local disk.
        validation_interval: Steps between validations, or `epoch`; there is one after the last step too. None
            never validates.
        listen: `objective`, or the name of a metric (`dataset/metric` for one on a dataset).
        optimizer_cls: A name in `torch.optim`, `package.module:Class`, or a class.
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
        scheduler_cls: What changes the learning rates: a name in `torch.optim.lr_scheduler`,
            `package.module:Name`, or a class, or a function that makes one of an optimizer.
        scheduler_kwargs: Its options. A value may name a number of the run, `"max_iterations"`, `"max_epochs"` or
            `"steps_per_epoch"`, or be a formula of them, `"max_iterations // 10"`, rounded down. `SequentialLR`
            and `ChainedScheduler` get `schedulers=[{"cls": "LinearLR", "total_iters": 100}, ...]`.
        scheduler_interval: When the scheduler makes a step: `step`, `epoch` or `validation`. None is `step`, and
            `validation` for `ReduceLROnPlateau`, which gets the value of `listen`, and its mode if it has none.
        param_groups: From the name of a parameter and the parameter to the options of the optimizer for it, such
            as `{"weight_decay": 0}`; `{}` has those of `optimizer_kwargs`, and None leaves it out.
        gradient_accumulation_steps: Batches of `batch_size` rows a step; their gradients are added up, weighed by
            rows, so that they are those of one batch. The last step of an epoch may have fewer.
        gradient_clip_norm: The norm of all gradients of a step together is at most this.
        gradient_clip_value: No element of a gradient is larger than this, or smaller than its negative.
        precision: In which floats modules and the objective compute, by autocast: `fp32`, `bf16` or `fp16`, whose
            gradients are scaled. Weights stay as they are.
        ema_decay: Validate and publish an exponential mean of the weights; a step keeps this part of the mean.
        compile: True, or the options of `torch.compile`: compile the model's training method.
        max_epochs: The most epochs.
        max_seconds: After so many seconds, those of earlier attempts included, the run ends with its current step.
        callbacks: Objects with some of the methods `on_start(fit)`, `on_step(fit, event)`,
            `on_validation(fit, event)`, `on_checkpoint(fit)` and `on_end(fit)`. Their `state_dict` is in
            checkpoints. An error in one ends the run unless it has `may_fail = True`.
        valid_transform: In place of `transform` in validations, where training augments, and in serving where the
            model has `preprocess="trainer"`; there it gets None in place of the target.
        training_state: What an earlier run ended with besides `optimizer_state`: counters of schedulers, the
            scale of fp16, states of callbacks. A run stores it; None starts anew.
        on_bad_document: What is done with a document that lacks a field, has a value of another dtype or shape
            than the others, or for which `transform` fails: `raise` ends the run with an error that names it,
            `skip` leaves it out and counts it.
        sample_weight: A field with the weight of each training document, a number from 0 to 1000: how many times
            it comes in an epoch on average. Seed, epoch and `_id` decide how often it does in one. None: once.

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
    validation_interval: int | str | None = 100
    listen: str = OBJECTIVE
    optimizer_cls: str | type[torch.optim.Optimizer] = "Adam"
    optimizer_kwargs: Mapping[str, Any] | None = None
    optimizer_state: Mapping[str, Any] | None = None
    collate_fn: Callable[[list[Any]], Any] | None = None
    model: TorchModel | None = None
    seed: int = 0
    defaults: Mapping[str, Any] | None = dataclasses.field(default=None, metadata={ADDED: "0.2.0"})
    dtypes: Mapping[str, str] | None = dataclasses.field(default=None, metadata={ADDED: "0.2.0"})
    split: Split | float | None = dataclasses.field(default=None, metadata={ADDED: "0.2.0"})
    log_interval: int | None = dataclasses.field(default=50, metadata={ADDED: "0.2.0"})
    scheduler_cls: str | Callable[..., Any] | None = dataclasses.field(default=None, metadata={ADDED: "0.2.0"})
    scheduler_kwargs: Mapping[str, Any] | None = dataclasses.field(default=None, metadata={ADDED: "0.2.0"})
    scheduler_interval: str | None = dataclasses.field(default=None, metadata={ADDED: "0.2.0"})
    param_groups: Callable[[str, torch.nn.Parameter], Mapping[str, Any] | None] | None = dataclasses.field(
        default=None, metadata={ADDED: "0.2.0"}
    )
    gradient_accumulation_steps: int = dataclasses.field(default=1, metadata={ADDED: "0.2.0"})
    gradient_clip_norm: float | None = dataclasses.field(default=None, metadata={ADDED: "0.2.0"})
    gradient_clip_value: float | None = dataclasses.field(default=None, metadata={ADDED: "0.2.0"})
    precision: str = dataclasses.field(default="fp32", metadata={ADDED: "0.2.0"})
    ema_decay: float | None = dataclasses.field(default=None, metadata={ADDED: "0.2.0"})
    compile: bool | Mapping[str, Any] = dataclasses.field(default=False, metadata={ADDED: "0.2.0"})
    max_epochs: int | None = dataclasses.field(default=None, metadata={ADDED: "0.2.0"})
    max_seconds: float | None = dataclasses.field(default=None, metadata={ADDED: "0.2.0"})
    callbacks: Sequence[Any] = dataclasses.field(default=(), metadata={ADDED: "0.2.0"})
    valid_transform: Callable[..., Any] | None = dataclasses.field(default=None, metadata={ADDED: "0.2.0"})
    training_state: Mapping[str, Any] | None = dataclasses.field(default=None, metadata={ADDED: "0.2.0"})
    on_bad_document: Literal["raise", "skip"] = dataclasses.field(default="raise", metadata={ADDED: "0.2.0"})
    sample_weight: str | None = dataclasses.field(default=None, metadata={ADDED: "0.2.0"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.max_iterations, PowerOfTen):  # the default, which prints short in signatures
            object.__setattr__(self, "max_iterations", int(self.max_iterations))
        key = Key.parse(self.key)
        check_signature(self.signature)
        check_dtypes(self.dtypes, key.paths)
        check_on_bad_document(self.on_bad_document)
        if self.split is not None:
            as_split(self.split)
        check_sample_weight(self.sample_weight)
        check_defaults(self.defaults, weighted_key(key, self.sample_weight).paths)
        self._check_types()
        self._check_numbers()
        if self.compute_kwargs:
            check_compute(self.compute_kwargs)
        check_trainer_loader(self.loader_kwargs or {}, workers=(self.compute_kwargs or {}).get("num_workers"))
        check_optimizer(self.optimizer_cls, self.optimizer_kwargs or {})
        self._check_step()
        if self.optimizer_state is not None and type(self).get_optimizers is TorchTrainer.get_optimizers:
            check_state(self.optimizer_cls, self.optimizer_kwargs or {}, self.optimizer_state)
        is_lbfgs = optimizer_class(self.optimizer_cls) is torch.optim.LBFGS
        if is_lbfgs and type(self).take_step is TorchTrainer.take_step:
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
        if model.preprocess == TRAINER:
            check_served(model, has_collate=self.collate_fn is not None)
        if self.transform is None and self.collate_fn is None:
            check_key(key or Key.parse(self.key), self.signature, takes_batch=model.takes_batch)
        validation = model.validation
        known = (
            self.validates_itself
            or self.listen == OBJECTIVE
            or (validation is not None and validation.higher_is_better(self.listen) is not None)
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

    @functools.cached_property
    def lanes(self) -> Lanes:
        """Into how many lanes a step is cut, and how many workers compute them."""
        if not self.compute_kwargs:
            return _PLAIN
        size = (self.loader_kwargs or {}).get("batch_size", 1)
        return Lanes.of(self.compute_kwargs, size, self.gradient_accumulation_steps)

    def forward(self, model: TorchModel, batch: Any) -> Passed:
        """Run the model on a batch; the result holds the objective's arguments. Raises: SignatureError."""
        if self.precision == "fp32" and type(self).autocasting is _autocasting:  # small models notice a context
            return self.mapping(model, batch)
        with self.autocasting(model):
            return self.mapping(model, batch)

    def served_input(self, model: TorchModel, item: Any) -> Any:
        """What a model with `preprocess="trainer"` gets of an item; see `BatchMapping.served_input`."""
        transform = self.transform if self.valid_transform is None else self.valid_transform
        return self.mapping.served_input(model, item, transform)

    def compute_objective(self, model: TorchModel, batch: Any) -> Tensor:
        """The objective of a batch, a scalar tensor with its graph.

        Raises:
            SignatureError: The batch does not have the structure that the signature needs.
            ParameterError: The objective gave no scalar, or one without a graph.
        """
        if self.precision == "fp32" and type(self).autocasting is _autocasting:
            passed = self.forward(model, batch)
            loss = scalar(passed.into(self.objective))
        else:
            with self.autocasting(model):
                passed = self.forward(model, batch)
                loss = scalar(passed.into(self.objective))
        if is_accumulating():
            count_share(counted_share(self.objective, passed))
        if not loss.requires_grad:
            raise ParameterError(
                "objective gave a number that depends on no weight; do not detach what it is computed from, "
                "and leave some parameter of the model with requires_grad=True",
                field="objective",
            )
        return loss

    def get_optimizers(self, model: TorchModel) -> Sequence[torch.optim.Optimizer]:
        """The optimizers of a run, made once before the first step. Raises: OptimizerError."""
        options = self.optimizer_kwargs or {}
        parameters: Iterable[Any] = model.parameters()
        if self.param_groups is not None:
            known = make_optimizer(self.optimizer_cls, [torch.nn.Parameter(torch.zeros(1, 1))], options).defaults
            parameters = grouped_parameters(model.object.named_parameters(), self.param_groups, known)
        try:
            return (make_optimizer(self.optimizer_cls, parameters, options),)
        except OptimizerError as error:  # the options were tried at construction: it is the parameters
            name = optimizer_name(optimizer_class(self.optimizer_cls))
            raise OptimizerError(
                f"{name} does not take the parameters of the model ({error.__cause__ or error}); "
                "override get_optimizers, and give each optimizer those that it takes",
                field="optimizer_cls",
            ) from error

    def get_schedulers(self, optimizers: Sequence[torch.optim.Optimizer]) -> Sequence[LRScheduler]:
        """The schedulers of a run, made once before the first step: one for each optimizer, or none.

        In a run `scheduler_kwargs` has numbers in place of their names.

        Args:
            optimizers: Those of `get_optimizers`.

        Raises:
            ParameterError: The scheduler refuses its options.
        """
        if self.scheduler_cls is None:
            return ()
        return tuple(make_scheduler(self.scheduler_cls, self.scheduler_kwargs or {}, one) for one in optimizers)

    @property
    def validates_itself(self) -> bool:
        """Whether a subclass overrides `validate`."""
        return type(self).validate is not TorchTrainer.validate

    def validate(self, model: TorchModel, batch: Any) -> Mapping[str, float | Tensor]:
        """What a validation measures of one batch, by name; values of batches are averaged by their rows.

        A subclass overrides it where a model has no single forward pass. Metrics are not measured then; `listen`
        names one of the values, and lower is better unless a metric of that name says otherwise.

        Args:
            model: The model, in `eval()` mode, without gradients.
            batch: A batch, on the model's device.
        """
        return {OBJECTIVE: self.compute_validation_objective(model, self.forward(model, batch))}

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
        for field in ("transform", "collate_fn", "valid_transform", "param_groups"):
            if getattr(self, field) is not None and not callable(getattr(self, field)):
                raise ParameterError(f"{field} must be a function or None", field=field)
        for field in ("data_prefetch", "in_memory", "download"):
            if not isinstance(getattr(self, field), bool):
                raise ParameterError(f"{field}={getattr(self, field)!r}: True or False", field=field)
        mappings = ("metric_values", "compute_kwargs", "loader_kwargs", "optimizer_kwargs", "optimizer_state")
        for field in (*mappings, "scheduler_kwargs", "training_state"):
            if getattr(self, field) is not None and not isinstance(getattr(self, field), Mapping):
                raise ParameterError(f"{field} must be a dict or None", field=field)
        if self.model is not None and not isinstance(self.model, TorchModel):
            raise ParameterError("model must be a TorchModel or None", field="model")

    def _check_numbers(self) -> None:
        for name, values in (self.metric_values or {}).items():
            if not isinstance(name, str) or not isinstance(values, list | tuple):
                raise ParameterError("metric_values maps names to lists of numbers", field="metric_values")
        counts = ("prefetch_size", "prefetch_factor", "max_iterations", "no_improve_then_stop")
        for field in (*counts, "gradient_accumulation_steps"):
            _check_positive(field, getattr(self, field))
        if self.max_epochs is not None:
            _check_positive("max_epochs", self.max_epochs)
        for field in ("max_seconds", "gradient_clip_norm", "gradient_clip_value", "ema_decay"):
            if getattr(self, field) is not None:
                _check_above_zero(field, getattr(self, field))
        if self.ema_decay is not None and self.ema_decay >= 1:
            raise ParameterError(f"ema_decay={self.ema_decay!r}: it must be below 1, as 0.999", field="ema_decay")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ParameterError(f"seed={self.seed!r}: it must be a whole number", field="seed")
        if self.log_interval is not None:
            _check_positive("log_interval", self.log_interval)
        self._check_end()

    def _check_end(self) -> None:
        if self.validation_interval is not None:
            if self.validation_interval != "epoch":
                _check_positive("validation_interval", self.validation_interval)
        elif self.max_iterations >= UNLIMITED and self.max_epochs is None and self.max_seconds is None:
            raise ParameterError(
                "validation_interval=None never stops early; give a finite max_iterations",
                field="max_iterations",
            )

    def _check_step(self) -> None:
        """Refuse parameters of the step that do not go together, or do not exist."""
        if self.precision not in PRECISIONS:
            names = ", ".join(PRECISIONS)
            raise ParameterError(f"precision={self.precision!r}: it must be one of {names}", field="precision")
        check_compile(self.compile)
        if self.callbacks != ():
            check_callbacks(self.callbacks)
        self._check_lanes()
        if self.gradient_accumulation_steps > 1 and type(self).take_step is not TorchTrainer.take_step:
            raise ParameterError(
                "gradient_accumulation_steps: take_step is overridden, and gets one batch; override backward or "
                "update instead, or leave it at 1",
                field="gradient_accumulation_steps",
            )
        self._check_schedule()

    def _check_lanes(self) -> None:
        if self.lanes.lanes > 1 and type(self).take_step is not TorchTrainer.take_step:
            raise ParameterError(
                f"compute_kwargs: lanes={self.lanes.lanes}, and take_step is overridden: it gets one batch, and "
                "cannot be cut into lanes; override backward or update instead, or leave out workers and lanes",
                field="compute_kwargs",
            )

    def _check_schedule(self) -> None:
        if self.scheduler_interval not in (None, *INTERVALS):
            raise ParameterError(
                f"scheduler_interval={self.scheduler_interval!r}: it must be one of {', '.join(INTERVALS)}",
                field="scheduler_interval",
            )
        if type(self).get_schedulers is not TorchTrainer.get_schedulers:
            return
        if self.scheduler_cls is None:
            for field in ("scheduler_kwargs", "scheduler_interval"):
                if getattr(self, field) is not None:
                    raise ParameterError(f"{field} needs a scheduler_cls", field=field)
            return
        waits = is_plateau(self.scheduler_cls) or self.scheduler_interval == "validation"
        if waits and self.validation_interval is None:
            raise ParameterError(
                "the scheduler makes its steps at validations, and validation_interval is None",
                field="scheduler_interval",
            )
        options = self.scheduler_kwargs or {}
        if (
            named_numbers(options) - {"steps_per_epoch"}
            and self.max_iterations >= UNLIMITED
            and not self.max_epochs
        ):
            raise ParameterError(
                "scheduler_kwargs names how long the run is; give max_iterations or max_epochs",
                field="scheduler_kwargs",
            )
        has_groups = self.param_groups is not None or type(self).get_optimizers is not TorchTrainer.get_optimizers
        check_scheduler(self.scheduler_cls, options, self.scheduler_interval, groups=has_groups)


def _check_positive(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ParameterError(f"{field}={value!r}: it must be a whole number from 1 on", field=field)


def _check_above_zero(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ParameterError(f"{field}={value!r}: it must be a number above 0", field=field)


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
    names = {optimizer_name(optimizer_class(one.optimizer_cls)) for one in (before, trainer)}
    if len(names) > 1:
        return trainer
    state = {"optimizer_state": before.optimizer_state, "training_state": before.training_state}
    return trainer.replace(uuid=trainer.uuid, **state)


def trainer_on_device(trainer: TorchTrainer, device: torch.device) -> TorchTrainer:
    """The trainer with what its objective, and the fields of its subclass, hold on a device; else the same."""
    moved = {name: on_device(getattr(trainer, name), device) for name in parameter_fields(trainer)}
    return changed_trainer(
        trainer, {name: value for name, value in moved.items() if value is not getattr(trainer, name)}
    )


def changed_trainer(trainer: TorchTrainer, fields: Mapping[str, Any]) -> TorchTrainer:
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
            fields[name] = map_contained(getattr(trainer, name), copy.deepcopy, copy.deepcopy, leave=Component)
            Contained(fields[name]).load_state_dict(Contained(getattr(own, name)).state_dict())
    return changed_trainer(trainer, fields)


@contextlib.contextmanager
def evaluating_all(trainer: TorchTrainer, model: TorchModel) -> Iterator[None]:
    """As `evaluating`, for the module of a model and for those that the objective and a subclass's fields hold."""
    with contextlib.ExitStack() as entered:
        entered.enter_context(evaluating(model.object))
        for name in parameter_fields(trainer):
            for module in Contained(getattr(trainer, name)).modules:
                entered.enter_context(evaluating(module))
        yield


def all_modules(trainer: TorchTrainer, model: TorchModel) -> dict[str, torch.nn.Module]:
    """The module of a model, and those that the objective and a subclass's fields hold, by names of their own."""
    found = {"": model.object}
    for name in parameter_fields(trainer):
        found |= {f"{name}{n}": module for n, module in enumerate(Contained(getattr(trainer, name)).modules)}
    return found


SETTINGS = frozenset({field.name for field in dataclasses.fields(TorchTrainer)})
"""The fields of a trainer without those of a subclass."""
