"""Runs the training loop: batches in, events out, a trained model at the end.

`Fit.run` yields an event after each optimizer step and each validation; between two events the run can be stopped
or captured, and another process that restores the capture goes on to the same bits.

Guarantees: the weights at the end are the best by `listen` where there was a validation, else the last; draws
depend on the trainer's seed alone (see `generators`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import LRScheduler

from mongotorch.errors import EmptySelectError, NonFiniteLossError, ParameterError
from mongotorch.tensors import copied_values, copy_tensors, to_device
from mongotorch.train.callbacks import Callbacks, Stepped, Trained, Validated
from mongotorch.train.evaluation import TRAINING, EarlyStopping, evaluate, try_first_batch
from mongotorch.train.extra_state import ExtraState, Unsaved, objectives_of
from mongotorch.train.generators import RunGenerators, seeded, set_generator_state
from mongotorch.train.mapping import scalar
from mongotorch.train.model import TorchModel, check_state_is_taken, compiled, copied_state, training_device
from mongotorch.train.optimizers import continue_from, load_state, state_of
from mongotorch.train.parallel import ALONE, Dealt, Group, LaneStep, first_rank, pinned_threads
from mongotorch.train.schedulers import filled, is_plateau, named_numbers, run_numbers
from mongotorch.train.step import MicroBatches, StepRun, grouped, lane_steps, trained_parameters
from mongotorch.train.trainer import UNLIMITED, TorchTrainer, all_modules, changed_trainer, trainer_on_device

_log = logging.getLogger("mongotorch")
Event = Stepped | Validated
_MOST_UNCHECKED = 32  # losses that may stay on an accelerator before they are checked


class Batches(Protocol):
    """Batches of one epoch for each iteration, with a position that can be saved."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]:
        """The position."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position."""


@final
class Fit:
    """One run of a trainer on a model, whose weights it changes.

    Args:
        trainer: How to train.
        model: What to train.
        batches: The training batches.
        sets: The validation batches by the name of their set; the empty name is the fold `valid`.
        state: What `capture` gave in a run that ended early, on any number of ranks; None starts.
        group: The ranks that train the model together. Each has a `Fit` of its own with the steps of its lanes and
            its validation batches (see `Lanes`), and all iterate `run()`, which yields the same events on each;
            what a step logs in its first lane is in those of rank 0. Rank 0 alone is captured.

    Raises:
        ParameterError: The device is not there, or the model does not go with the trainer, or the trainer's lanes
            cannot be shared by the group.
        OptimizerError: The optimizer state does not fit.
    """

    def __init__(
        self,
        trainer: TorchTrainer,
        model: TorchModel,
        *,
        batches: Batches,
        sets: Mapping[str, Iterable[Any]],
        state: Mapping[str, Any] | None = None,
        group: Group = ALONE,
    ) -> None:
        trainer.check_model(model)
        if group.world > 1:
            trainer.lanes.check_world(group.world)
        self.device = training_device(trainer.compute_kwargs, model.preferred_devices)
        self._given, self._model = trainer, model
        self._batches, self._sets = batches, sets
        self._state, self._group = state, group
        self._last: Any = None  # the batch of the last step
        self._is_checked = False  # whether a checkpoint was compared with the run
        self._unsaved_at_best: dict[tuple[str, str], Any] | None = None
        self._metrics = model.validation.metrics if model.validation is not None else ()
        self._best = EarlyStopping(trainer.listen, model.validation, trainer.no_improve_then_stop)
        self._values = {name: list(v) for name, v in (trainer.metric_values or {}).items()}
        self._measured: dict[str, float] = {}  # by the last validation
        self._unchecked: list[Tensor] = []
        self._generators = RunGenerators(trainer.seed)
        self.step, self._validated, self._skipped = 0, 0, 0
        self._idle = 0  # epochs begun since the last step
        self.epoch, self._epoch_ended = 0, 0
        self._is_epoch_over = False  # whether the epoch of a resumed run had ended, and nobody has counted it
        self._is_stopped = self._is_asked_to_stop = False
        self._has_ended = False  # whether callbacks have heard of the end
        self._spent_s = 0.0
        self._begun: float | None = None  # on the monotonic clock
        self._known: dict[str, int] = {}  # numbers of this run
        self._callbacks = Callbacks(trainer.callbacks) if trainer.callbacks else None
        self._trainer = trainer_on_device(trainer, self.device)

    def check(self, *, training: bool = False) -> None:
        """Measure the first batch of each validation set, to know before the first step what cannot be measured.

        It leaves nothing behind. All ranks of a group call it, and all raise what it finds. A module that its
        first training batch makes (a lazy one) is not checked.

        Args:
            training: Also the first batch of the training documents; the first step would find out anyway.

        Raises:
            EmptyFoldError: A set has no batch.
            MongotorchError: What the batches raise.
        """
        module = self._model.object
        if any(map(is_lazy, [*module.parameters(), *module.buffers()])):
            return
        alone = contextlib.nullcontext(True)
        with alone if self._group.world == 1 else first_rank(self._group) as is_first, seeded(self._trainer.seed):
            module.to(self.device)
            sets = {TRAINING: self._batches, **self._sets} if training else self._sets
            if is_first:  # it has the first batches
                try_first_batch(self._trainer, self._model, sets, self._metrics, self.device)

    def run(self) -> Generator[Event]:
        """Train, and yield each step and each validation when it is done.

        Raises:
            NonFiniteLossError: A loss, the objective of a validation, or a weight at the end is not finite.
            MongotorchError: What the batches raise.
        """
        threads = self._given.lanes.threads
        with contextlib.nullcontext() if threads is None else pinned_threads(threads):
            yield from self._generators.drawing(self._events())
        self._check_losses()
        self._check_weights()

    def stop(self) -> None:
        """End the run after the step that is being made, with a validation as after the last step of any run.

        It may be called between two events and from another thread. Where a step is cut into lanes, all ranks hear
        of it in the next step, and the run ends after that one; it is enough to call it on one of them.
        """
        self._is_asked_to_stop = True
        self._is_stopped = self._is_stopped or self._given.lanes.lanes == 1

    @property
    def rank(self) -> int:
        """Which of the ranks that train the model this is; 0 where it is the only one."""
        return self._group.rank

    @property
    def trainer(self) -> TorchTrainer:
        """How it trains: the trainer that was given, or a copy of it with what it holds on the device."""
        return self._trainer

    @property
    def model(self) -> TorchModel:
        """What it trains."""
        return self._model

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """The optimizers, from the first event on."""
        return self._optimizers

    @property
    def schedulers(self) -> Sequence[LRScheduler]:
        """The schedulers, from the first event on."""
        return self._step_run.schedulers

    @functools.cached_property
    def most_steps(self) -> int | None:
        """How many steps it makes at most; None where the trainer does not say. Raises: LengthUnknownError."""
        if self._given.max_epochs is not None:
            most = self._numbers(("max_iterations",))["max_iterations"]
        else:
            most = self._given.max_iterations
        return None if most >= UNLIMITED else most

    def trained(self) -> Trained:
        """The result of a run that has ended; the best weights are put into the model, in `eval()` mode."""
        module, self._is_checked = self._model.object, True
        if self._best.state is not None:
            module.load_state_dict(self._best.state["model"])
            self._extra.load_learned(self._best.state.get("learned", {}))
            if self._unsaved_at_best is not None and self._best.step != self.step:
                self._unsaved.restore(self._unsaved_at_best, modules_only=True)
            best = self._best.state
            optimizer_state, training_state, step = best["optimizer"], best.get("training", {}), self._best.step
            metrics = best.get("metrics", {})  # an older checkpoint has none
        else:
            optimizer_state, training_state, step = state_of(self._optimizers), self._outcome(), self.step
            if self._step_run.average is not None:
                self._step_run.average.apply()
            metrics = self._measured if self._validated == self.step else {}
        module.eval()
        module.to("cpu")
        return Trained(
            steps=self.step,
            optimizer_state=_on_cpu(optimizer_state),
            metric_values=self._values,
            best_step=step,
            eval_modules=self._eval_modules,
            metrics=dict(metrics),
            fields=self._extra.published_fields(self._given),
            training_state=_on_cpu(training_state) or None,
            skipped=self._skipped,
            compute=self._compute(),
        )

    def _compute(self) -> dict[str, Any]:
        lanes = self._given.lanes
        if lanes.lanes == 1:
            return {}
        own = {"lanes": lanes.lanes, "reduce": lanes.reduce, "threads": lanes.threads}
        return {"workers": self._group.world, **own}

    def capture(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as copies. Call it between two events."""
        self._check_losses()
        self._call("on_checkpoint")
        now = self._best.state if self._best.step == self.step else None  # copied by the validation just now
        if now is not None and self._is_changed_by_validation:
            now = None
        captured: dict[str, Any] = {
            "step": self.step,
            "validated": self._validated,
            "model": now["model"] if now else copied_state(self._model.object),
            "optimizer": now["optimizer"] if now else state_of(self._optimizers),
            "random": self._generators.state(),
            "batches": self._batches.state_dict(),
            "values": {name: list(values) for name, values in self._values.items()},
            "stopped": self._is_stopped or self._is_asked_to_stop,
            "epoch": [self.epoch, self._epoch_ended],
            "is_epoch_over": self._is_epoch_over or bool(getattr(self._batches, "is_epoch_over", False)),
            "spent_s": self._elapsed_s(),
            "numbers": dict(self._known),
            "measured": self._measured,
            "best": self._best.state_dict(),
            "kept": self._extra.state_dict(),
            "recipe": self._step_run.state_dict(),
            "callbacks": [] if self._callbacks is None else self._callbacks.state_dict(),
            **({"skipped": self._skipped} if self._skipped else {}),
            **({"ended": True} if self._has_ended else {}),
        }
        if not self._is_checked and self._last is not None:
            self._is_checked = True
            self._warn_of_unsaved(captured["model"])
        return captured

    def _restore(self, state: Mapping[str, Any]) -> None:
        if self._extra.load_state_dict(state.get("kept", {})):
            self._make_parts()
        missing = self._extra.load_state_dict(state.get("kept", {}))
        if missing:
            _log.warning("the checkpoint has a state of %s, which this run does not have", ", ".join(missing))
        self.step, self._validated = state["step"], state["validated"]
        self._is_stopped = self._is_stopped or state.get("stopped", False)
        self.epoch, self._epoch_ended = state.get("epoch", (0, self.step))
        self._is_epoch_over = state.get("is_epoch_over", False)
        self._spent_s = state.get("spent_s", 0.0)
        self._model.object.load_state_dict(copied_values(state["model"]))
        load_state(self._optimizers, state["optimizer"])
        self._step_run.load_state_dict(state.get("recipe", {}))
        self._batches.load_state_dict(state["batches"])
        self._values = {name: list(values) for name, values in state["values"].items()}
        self._measured = dict(state.get("measured", {}))
        self._skipped, self._has_ended = state.get("skipped", 0), state.get("ended", False)
        self._best.load_state_dict(state["best"])
        if self._callbacks is not None:
            self._callbacks.load_state_dict(state.get("callbacks", []))
        set_generator_state(state["random"])

    def _events(self) -> Generator[Event]:
        self._begun = time.monotonic()
        self._model.object.to(self.device)
        self._trainer = self._with_numbers(self._trainer)
        self._optimizers = self._trainer.get_optimizers(self._model)
        given, is_new = self._given, self._state is None
        if given.optimizer_state is not None and is_new:
            continue_from(self._optimizers, given.optimizer_state)
        self._step_run = StepRun(self._trainer, self._model, self._optimizers, self.device, self._made_lanes())
        if given.training_state is not None and is_new:
            # Schedules that name how long the run is are of one run.
            whole = named_numbers(given.scheduler_kwargs or {}) != set()
            self._step_run.continue_from(given.training_state, schedulers=not whole)
            if self._callbacks is not None:
                self._callbacks.load_state_dict(given.training_state.get("callbacks", []))
        self._extra = ExtraState(self._trainer, self._model, self._optimizers)
        self._warn_of_untrained_objective()
        self._eval_modules = self._model.start_training()
        self._unsaved = Unsaved(self._trainer, self._model)
        with compiled(self._model, given.compile):
            if self._state is not None:
                self._restore(self._state)
            else:
                check_state_is_taken(self._model.object)
            if not self._has_ended:
                self._call("on_start")
            yield from self._steps()
            if not self._has_ended:
                self._call("on_end")
            self._has_ended = True

    def _made_lanes(self) -> LaneStep | None:
        """What makes the gradients of a step that is cut into lanes."""
        lanes = self._given.lanes
        if lanes.lanes == 1:
            return None
        drops_last = bool((self._given.loader_kwargs or {}).get("drop_last"))
        lanes.check_module(self._model.object, self._group.world, drops_last=drops_last)
        made = LaneStep(lanes, self._group, seed=self._given.seed, modules=all_modules(self._trainer, self._model))
        made.begin(trained_parameters(self._model, self._optimizers))
        return made

    def _with_numbers(self, trainer: TorchTrainer) -> TorchTrainer:
        """The trainer with the numbers of this run in the options of its scheduler."""
        if trainer.scheduler_cls is None and trainer.scheduler_kwargs is None:
            return trainer
        options = trainer.scheduler_kwargs or {}
        changed = filled(options, self._numbers(named_numbers(options)))
        is_higher_better = self._best.higher_is_better
        if trainer.scheduler_cls is not None and is_plateau(trainer.scheduler_cls) and is_higher_better:
            changed = {"mode": "max", **changed}
        return trainer if changed == options else changed_trainer(trainer, {"scheduler_kwargs": changed})

    def _numbers(self, names: Iterable[str]) -> dict[str, int]:
        """Numbers of this run by name; those that a checkpoint has, as documents may have been deleted since."""
        if not set(names):
            return {}
        known, trainer = self._known or dict((self._state or {}).get("numbers", {})), self._given
        if set(names) - set(known):
            known = {"max_iterations": trainer.max_iterations}
            if trainer.max_epochs is not None or set(names) != set(known):
                known = run_numbers(
                    self._batches,
                    max_iterations=trainer.max_iterations,
                    max_epochs=trainer.max_epochs,
                    batches_per_step=1 if trainer.lanes.lanes > 1 else trainer.gradient_accumulation_steps,
                    is_weighted=trainer.sample_weight is not None,
                )
        self._known = known
        return known

    def _steps(self) -> Iterator[Event]:
        if self._is_validation_due():  # the run that was captured ended between a step and its validation
            yield self._validate()
        is_rest = self._state is not None and not self._is_epoch_over
        is_over, self._is_epoch_over = self._is_epoch_over, False
        if is_over and not self.is_over and self._end_epoch():
            yield self._validate()
        while not self.is_over:
            self._begin_epoch()
            batches = self._batches.rest() if is_rest and hasattr(self._batches, "rest") else iter(self._batches)
            is_rest = False
            busy_until = self._next_due()
            for step in self._grouped(batches):
                event = self._step_on(step)
                if event is None:
                    continue
                yield event
                if self.step < busy_until and not self._is_stopped:
                    continue
                if self._is_validation_due():
                    yield self._validate()
                if self.is_over:
                    return
                busy_until = self._next_due()
            if self._end_epoch():
                yield self._validate()

    def _end_epoch(self) -> bool:
        """Count an epoch in which there was a step; whether a validation is due."""
        if self._epoch_ended == self.step:
            return False  # a resumed run whose epoch had ended already
        self.epoch, self._epoch_ended = self.epoch + 1, self.step
        self._step_run.end_epoch()
        interval = self._trainer.validation_interval
        return self._is_validation_due() or (interval == "epoch" and self.step > self._validated)

    def _grouped(self, batches: Iterator[Any]) -> Iterator[MicroBatches]:
        """The steps of an epoch."""
        lanes = self._step_run.lane_step
        if lanes is not None:
            return lane_steps(batches, lanes)
        return grouped(self._batches, batches, self._trainer.gradient_accumulation_steps)

    def _step_on(self, step: MicroBatches) -> Stepped | None:
        """Make a step; None where all of its documents were left out, and there was none."""
        run, rows = self._step_run, sum(step.rows)
        loss = scalar(self._take_step(step)).detach()
        if run.lane_step is not None:
            self._skip_elsewhere(step, rows := run.lane_step.rows)
            if run.lane_step.is_empty:
                return None
        self.step, self._idle = self.step + 1, 0
        self._unchecked.append(loss)
        if self.device.type == "cpu" or len(self._unchecked) >= _MOST_UNCHECKED:
            self._check_losses()
        if self._trainer.max_seconds is not None and self._elapsed_s() >= self._trainer.max_seconds:
            self.stop()
        if run.lane_step is not None:
            self._is_stopped = self._is_stopped or run.lane_step.is_stopped
        if self._trainer.on_bad_document == "skip":
            self._skipped = max(self._skipped, getattr(getattr(self._batches, "report", None), "skipped", 0))
        event = Stepped(
            step=self.step,
            loss=loss,
            rows=rows,
            values=run.values() if run.logged else {},
            gradient_norm=run.gradient_norm,
            learning_rates=run.learning_rates,
            waited_s=step.waited_s,
            skipped=self._skipped,
        )
        self._call("on_step", event)
        return event

    def _call(self, method: str, *args: Any) -> None:
        if self._callbacks is not None:
            self._callbacks.call(method, self, *args)

    def _skip_elsewhere(self, step: MicroBatches, rows: int) -> None:
        """Let the stream know what other ranks have left out of a step that had so many rows."""
        elsewhere = step.planned - step.skipped - rows
        if elsewhere and hasattr(self._batches, "skip_elsewhere"):
            self._batches.skip_elsewhere(elsewhere)

    def _elapsed_s(self) -> float:
        """Seconds that this run took, those of the runs that it goes on from included."""
        return self._spent_s + (time.monotonic() - self._begun if self._begun is not None else 0.0)

    def _take_step(self, step: MicroBatches) -> Tensor:
        run = self._step_run
        run.number, run.stops = self.step + 1, self._is_asked_to_stop
        try:
            if not run.accumulates:
                self._last = step.batches[0]
                return run.take(to_device(self._last, self.device))
            self._last = next((batch for batch in reversed(step.batches) if batch is not None), self._last)
            moved = tuple([to_device(batch, self.device) for batch in step.batches])
            return run.take(step._replace(batches=moved))
        except Exception as error:
            if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
                raise ParameterError(
                    f"step {self.step + 1} has a batch of {min(filter(None, step.rows))} row(s), of which a batch "
                    'norm has no statistics; give loader_kwargs={"drop_last": True}, or another batch_size',
                    field="loader_kwargs",
                ) from error
            error.add_note(f"in training, at step {self.step + 1}")
            raise

    def _warn_of_untrained_objective(self) -> None:
        left = self._extra.untrained()
        if left:
            warnings.warn(
                f"the objective has parameters that no optimizer trains: {', '.join(left)}; return an optimizer "
                "over them from get_optimizers, or give them requires_grad=False",
                stacklevel=2,
            )

    def _make_parts(self) -> None:
        """Take a step, which is undone by what is restored next: it makes what a trainer makes in its first."""
        for step in self._grouped(iter(self._batches)):
            self._take_step(step)
            break
        self._last = None
        self._unsaved.restore({})

    def _warn_of_unsaved(self, state: Mapping[str, Any]) -> None:
        """Log what the run has changed and a checkpoint does not have, where something depends on it."""
        lost = self._unsaved.lost(state, functools.partial(objectives_of, self._trainer, self._model, self._last))
        if lost:
            _log.warning(
                "the run changes %s, and no checkpoint has it: a run that is stopped and goes on starts with the "
                "first value, and can end with other weights; keep it in a persistent buffer, in get_extra_state, "
                "or in an object with state_dict and load_state_dict",
                ", ".join(lost),
            )

    def _is_validation_due(self) -> bool:
        interval = self._trainer.validation_interval
        if interval is None or self.step <= self._validated:
            return False
        return self._is_last_step or (interval != "epoch" and self.step % int(interval) == 0)

    def _next_due(self) -> int:
        """The next step after which a validation or the end may be due, as long as nobody asks for the end."""
        interval, most = self._trainer.validation_interval, self._trainer.max_iterations
        if interval is None or interval == "epoch":
            return most
        return min(most, (self.step // int(interval) + 1) * int(interval))

    def _begin_epoch(self) -> None:
        """The rest of a resumed epoch may be empty; a whole epoch may not, or the run would never end."""
        self._idle += 1
        if self._idle > 2:
            raise EmptySelectError("the training batches are empty: an epoch has no batch")

    @property
    def is_over(self) -> bool:
        """Whether the run has made its last step."""
        return self._best.should_stop or self._is_last_step

    @property
    def _is_last_step(self) -> bool:
        trainer = self._trainer
        if trainer.max_epochs is not None and self.epoch >= trainer.max_epochs:
            return True
        return (self._is_stopped and self.step > 0) or self.step >= trainer.max_iterations

    def _validate(self) -> Validated:
        self._check_losses()
        self._validated = self.step
        average = self._step_run.average
        with contextlib.nullcontext() if average is None else average.applied():
            try:
                values = evaluate(
                    self._trainer, self._model, self._sets, self._metrics, self.device, dealt=self._dealt()
                )
            except Exception as error:
                error.add_note(f"after step {self.step}")
                raise
            self._measured = values
            for name, value in values.items():
                self._values.setdefault(name, []).append(value)
            improved = self._best.update(values[self._trainer.listen], self.step)
            if improved:
                self._best.state = {
                    "model": copied_state(self._model.object),
                    "optimizer": state_of(self._optimizers),
                    "metrics": values,
                    "learned": self._extra.learned(),
                }
                self._unsaved_at_best = self._unsaved.changes(modules_only=True)
        self._step_run.end_validation(values[self._trainer.listen])
        event = Validated(step=self.step, values=values, improved=improved)
        self._call("on_validation", event)
        if improved and self._best.state is not None:
            self._best.state["training"] = self._outcome()
        return event

    def _dealt(self) -> Dealt | None:
        """How the batches of this validation are dealt out to ranks."""
        lanes, group = self._given.lanes.lanes, self._group
        return None if lanes == 1 else Dealt(group=group, seed=self._given.seed, step=self.step)

    def _outcome(self) -> dict[str, Any]:
        """What another run goes on from besides the optimizer state; empty where there is nothing."""
        states = [] if self._callbacks is None else self._callbacks.state_dict()
        callbacks = {"callbacks": states} if any(one["state"] is not None for one in states) else {}
        return {**self._step_run.outcome(), **callbacks}

    @property
    def _is_changed_by_validation(self) -> bool:
        """Whether weights or rates are others after a validation than those that it keeps."""
        run, trainer = self._step_run, self._trainer
        return run.average is not None or bool(run.schedulers) or bool(trainer.callbacks)

    def _check_losses(self) -> None:
        """Check the losses so far: several at once, since reading one makes an accelerator catch up."""
        if not self._unchecked:
            return
        unchecked, self._unchecked = self._unchecked, []
        for number, loss in enumerate(unchecked, self.step - len(unchecked) + 1):
            if not math.isfinite(value := loss.item()):
                raise NonFiniteLossError(
                    f"the objective is {value} at step {number}; nothing is published. "
                    "Try a lower learning rate, scale the inputs, or look at the data"
                )

    def _check_weights(self) -> None:
        if self._best.state is not None:
            return  # they were measured, and the objective was finite
        for name, parameter in self._model.object.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise NonFiniteLossError(
                    f"weight {name!r} is not finite after step {self.step}; nothing is published. "
                    "Try a lower learning rate",
                    field=name,
                )


def _on_cpu(state: Any) -> Any:
    return to_device(copy_tensors(state), torch.device("cpu"))
