"""Looks inside a trainer before it runs: its documents, the layers of its model, where the time of a step goes.

`stream_spec` is for those who only look at the stream.

Guarantees: what is trained here is a copy of the model; neither the model nor the trainer is changed, and nothing
is stored but the plan of the ranges, as by every read.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal, final

from mongotorch.data import DataCheck, Explanation, StreamSpec, check_documents, explain
from mongotorch.errors import ParameterError
from mongotorch.mongo.connection import Connection
from mongotorch.query import Query
from mongotorch.services.training.recipe import (
    DataProvenance,
    TrainingRecipe,
    opened_fit,
    training_spec,
)
from mongotorch.settings import Settings
from mongotorch.signature import weighted_key
from mongotorch.tensors import synchronize
from mongotorch.train import ModelSummary, Stepped, TorchModel, TorchTrainer, summarize, trainer_and_model

_WARM_UP: Final = 3  # steps that are not counted: the first ones set up what later ones use
_MOST_S: Final = 20.0
_MODES: Final[dict[str, Literal["memory", "download"]]] = {"in_memory": "memory", "download": "download"}
_STREAM_OPTIONS: Final = frozenset(
    {
        "drop_last",
        "transform",
        "signature",
        "collate_fn",
        "data_prefetch",
        "across_epochs",
        "prefetch_size",
        "prefetch_factor",
        "dtypes",
        "defaults",
        "on_bad_document",
        "sample_weight",
    }
)
_LARGE: Final = 0.3  # of a step


def _check_trainer(trainer: TorchTrainer, connection: Connection, settings: Settings) -> DataCheck:
    """Look at a sample of a trainer's documents, and try one batch of each fold and validation set.

    A batch goes through transform, model, objective and metrics; nothing is trained.

    Raises:
        MongotorchError: What a run would end in; other errors of the trainer's own functions have a note of where.
    """
    trainer, model = trainer_and_model(trainer)
    found = check_documents(
        connection.database,
        trainer.select,
        paths=weighted_key(trainer.key, trainer.sample_weight).paths,
        split=trainer.fold("train").split,
    )
    before = next((parameter.device for parameter in model.object.parameters()), None)
    recipe = TrainingRecipe(trainer=trainer, model=model)
    recipe.check(connection.database)
    try:
        with opened_fit(recipe, connection, settings, data=DataProvenance(record={})) as fit:
            fit.check(training=True)
    finally:
        if before is not None:
            model.object.to(before)
    return found


def checked(what: Query | TorchTrainer, connection: Connection, settings: Settings) -> DataCheck:
    """What documents hold, and whether a trainer can be trained on them; see `Datalayer.check`."""
    if isinstance(what, Query):
        return check_documents(connection.database, what)
    if isinstance(what, TorchTrainer):
        return _check_trainer(what, connection, settings)
    raise ParameterError(f"check a query or a trainer, not a {type(what).__name__}", field="what")


def summary_of(what: TorchModel | TorchTrainer, connection: Connection, settings: Settings) -> ModelSummary:
    """The layers of a model; of a trainer's, with the shapes that its first batch gives.

    Raises:
        ParameterError: It is neither, or the trainer has no model.
        MongotorchError: What the first batch of a run would end in.
    """
    if isinstance(what, TorchModel):
        return summarize(what)
    if not isinstance(what, TorchTrainer):
        raise ParameterError(f"give a model or a trainer, not a {type(what).__name__}", field="what")
    trainer, model = trainer_and_model(what)
    copied = _copied(model)
    recipe = TrainingRecipe(trainer=trainer, model=copied)
    with opened_fit(recipe, connection, settings, data=DataProvenance(record={})) as fit:
        return summarize(copied, lambda: fit.check(training=True))


def explained(
    trainer: TorchTrainer,
    connection: Connection,
    settings: Settings,
    *,
    step_seconds: float | None,
    measure: bool,
    steps: int,
) -> Explanation:
    """What reading a trainer's documents costs, and what its steps; see `Datalayer.explain`."""
    if not isinstance(trainer, TorchTrainer):
        raise ParameterError(f"trainer must be a trainer, not a {type(trainer).__name__}", field="trainer")
    times = measured(trainer, connection, settings, steps=steps) if measure else None
    if times is not None:
        step_seconds = sum(seconds for part, seconds in times.items() if part != "data")
    spec = training_spec(trainer, settings)
    found = explain(connection.database, spec, connection.opener, step_seconds=step_seconds)
    if times is None:
        return found
    slowest, advice = _advice(trainer, times)
    return dataclasses.replace(found, step=times, bottleneck=slowest, hints=(*advice, *found.hints))


def measured(trainer: TorchTrainer, connection: Connection, settings: Settings, *, steps: int) -> dict[str, float]:
    """Train a copy for some steps, or 20 seconds, and give the mean seconds of a step by part.

    Args:
        trainer: A trainer with a model.
        connection: The database.
        settings: The datalayer's.
        steps: Steps that are counted, after three that are not.

    Returns:
        `data` (waiting for the batch), `transfer` (to the device), `forward`, `backward` and `optimizer`; `step`
        for the last three, where a trainer's own `take_step` does not call `compute_objective` and `update`.

    Raises:
        ParameterError: The trainer has no model.
        MongotorchError: What the run would end in.
    """
    trainer, model = trainer_and_model(trainer)
    clock = _StepClock()
    recipe = TrainingRecipe(trainer=_timed(trainer, clock), model=_copied(model))
    recipe.check(connection.database)
    found: list[dict[str, float]] = []
    begun_s = time.perf_counter()
    with opened_fit(recipe, connection, settings, data=DataProvenance(record={})) as fit:
        clock.device = fit.device
        with contextlib.closing(fit.run()) as events:
            resumed_s = time.perf_counter()
            for event in events:
                if isinstance(event, Stepped):
                    found.append({"data": event.waited_s, **clock.parts(resumed_s + event.waited_s)})
                if len(found) >= steps + _WARM_UP or time.perf_counter() - begun_s > _MOST_S:
                    break
                clock.spent.clear()
                resumed_s = time.perf_counter()
    counted = found[_WARM_UP:] or found[-1:]
    return {part: sum(step[part] for step in counted) / len(counted) for part in counted[0]} if counted else {}


@final
class _StepClock:
    """Measures the parts of one step; what a device does is waited for at each end.

    Attributes:
        spent: Seconds by part, of this step.
        device: Where the model is.
    """

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.device: Any = None
        self._begun_s = 0.0

    @contextlib.contextmanager
    def measuring(self, part: str) -> Iterator[None]:
        """Add the time inside to a part."""
        synchronize(self.device)
        begun_s = time.perf_counter()
        if part == "step":
            self._begun_s = begun_s
        try:
            yield
        finally:
            synchronize(self.device)
            self.spent[part] = self.spent.get(part, 0.0) + time.perf_counter() - begun_s

    def parts(self, got_batch_s: float) -> dict[str, float]:
        """The parts of the step that was made, whose batch was there at a time."""
        transfer_s, step_s = max(self._begun_s - got_batch_s, 0.0), self.spent.get("step", 0.0)
        if "forward" not in self.spent or "optimizer" not in self.spent:
            return {"transfer": transfer_s, "step": step_s}
        forward_s, optimizer_s = self.spent["forward"], self.spent["optimizer"]
        backward_s = max(step_s - forward_s - optimizer_s, 0.0)
        times = {"forward": forward_s, "backward": backward_s, "optimizer": optimizer_s}
        return {"transfer": transfer_s, **times}


def _timed(trainer: TorchTrainer, clock: _StepClock) -> TorchTrainer:
    """A copy of a trainer, objective and all, whose steps are measured."""
    cls: Any = type(trainer)

    def wrapped(name: str, part: str) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with clock.measuring(part):
                return getattr(cls, name)(self, *args, **kwargs)

        return call

    parts = {"take_step": "step", "compute_objective": "forward", "update": "optimizer"}
    methods = {name: wrapped(name, part) for name, part in parts.items()}
    copied: TorchTrainer = copy.copy(trainer)
    copied.__dict__.pop("mapping", None)  # it holds the objective
    object.__setattr__(copied, "objective", copy.deepcopy(trainer.objective))
    object.__setattr__(copied, "__class__", type(cls.__name__, (cls,), methods))
    return copied


def _copied(model: TorchModel) -> TorchModel:
    """A copy of a model with a module of its own."""
    copied = copy.copy(model)
    object.__setattr__(copied, "object", copy.deepcopy(model.object))
    return copied


def _advice(trainer: TorchTrainer, times: dict[str, float]) -> tuple[str, list[str]]:
    """The slowest part of a step in words, and what would help."""
    total = max(sum(times.values()), 1e-12)
    shares = {part: seconds / total for part, seconds in times.items()}
    slowest = max(shares, key=shares.__getitem__)
    names = {
        "data": "waiting for data",
        "transfer": "moving batches to the device",
        "forward": "the forward pass",
        "backward": "the backward pass",
        "optimizer": "the optimizer",
        "step": "the step",
    }
    advice = []
    if shares["data"] > _LARGE:
        advice.append(f"{shares['data']:.0%} of a step is waiting for data: {_faster_data(trainer)}")
    if shares.get("transfer", 0.0) > _LARGE:
        advice.append(
            'moving batches takes long: loader_kwargs={"pin_memory": True}, or fields of a smaller dtype'
        )
    if shares.get("optimizer", 0.0) > _LARGE:
        advice.append(
            "the optimizer takes long: a larger batch_size makes fewer steps, and "
            'optimizer_kwargs={"fused": True} faster ones where the optimizer has it'
        )
    if not advice and total < 0.001:
        advice.append("a step is so short that Python takes much of it: a larger batch_size makes fewer steps")
    return f"{names[slowest]} ({shares[slowest]:.0%} of a step)", advice


def _faster_data(trainer: TorchTrainer) -> str:
    if trainer.transform is not None or trainer.collate_fn is not None:
        return 'compute_kwargs={"num_workers": 2} builds samples in processes'
    if not trainer.in_memory and not trainer.data_prefetch:
        return "data_prefetch=True reads while the model is trained"
    if not trainer.in_memory:
        return "in_memory=True, or download=True, reads the documents once"
    return "a larger batch_size makes fewer batches"


def stream_spec(settings: Settings, query: Query, options: Mapping[str, Any], **fields: Any) -> StreamSpec:
    """How a query is streamed by `db.stream`.

    Args:
        settings: The datalayer's.
        query: The documents.
        options: The trainer's stream options and those of a DataLoader, in one mapping.
        fields: Fields of the `StreamSpec`.

    Raises:
        ParameterError, LoaderOptionError: An option that does not exist, or a value that cannot be used.
    """
    own = {name: value for name, value in options.items() if name in _STREAM_OPTIONS}
    loader = {name: value for name, value in options.items() if name not in {*_STREAM_OPTIONS, *_MODES}}
    modes = [mode for name, mode in _MODES.items() if options.get(name)]
    return StreamSpec(
        query=query,
        mode=modes[0] if modes else "stream",
        prefetch_bytes=settings.prefetch_bytes,
        worker_niceness=settings.worker_niceness,
        loader=loader,
        cache_dir=settings.cache_dir,
        read_deadline_s=settings.read_deadline_s,
        **{"data_prefetch": True, **own},
        **fields,
    )
