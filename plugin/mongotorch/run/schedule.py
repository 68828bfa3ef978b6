"""The Schedule: which trainer runs again, when, on what, and what it takes to go live.

Always: a schedule is a frozen component that holds no time and no count; what has happened is elsewhere, so
that pausing, changing or removing one never loses what another has seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, final

from mongotorch.component import Component
from mongotorch.errors import ParameterError
from mongotorch.run.gates import Better, Gate, gate_of
from mongotorch.run.scores import Scores
from mongotorch.run.triggers import AnyOf, Trigger, Waited
from mongotorch.run.triggers.base import CHANGED, INSERTED, check_flag, check_seconds

DATA = ("all", "new")
BETTER = Better()


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Schedule(Component):
    """When a trainer runs again, and whether what it trains goes live.

    Args:
        identifier: Its name.
        db: The datalayer that `apply()` uses; never stored.
        uuid: The identity of the version it becomes; made when none is given.
        artifacts: `{field: codec name}`, over the default choice of codec.
        trainer: What runs: a trainer with its model.
        trigger: When it runs.
        gate: What decides whether the trained model goes live: `Better`, `Always`, `Never`, or a function
            `(champion, challenger) -> bool` of the scores of both.
        warm_start: Start from the live model and its optimizer's state; else from the trainer's model as it is.
        data: `all`: the trainer's whole select; `new`: its documents that no published run has trained on.
        max_wait: Runs as well when something has waited for this many seconds, though the trigger is not due;
            None: only the trigger counts.
        paused: Nothing runs by itself; what is to be counted is counted.

    Raises:
        IdentifierError: The identifier is none.
        ParameterError: Another argument cannot be used; `field` names it.
    """

    type_id: ClassVar[str] = "schedule"

    trainer: Component
    trigger: Trigger
    gate: Gate | Callable[[Scores | None, Scores | None], bool] = BETTER
    warm_start: bool = True
    data: str = "all"
    max_wait: float | None = None
    paused: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        trainer: Any = self.trainer  # by what it has: this room does not know the one where trainers are
        if not isinstance(trainer, Component) or trainer.type_id != "trainer":
            raise ParameterError("trainer must be a trainer, such as a TorchTrainer", field="trainer")
        if getattr(trainer, "model", None) is None:
            raise ParameterError(
                "trainer has no model to train; give it one: TorchTrainer(..., model=...)", field="trainer"
            )
        if not isinstance(self.trigger, Trigger):
            raise ParameterError(
                f"trigger={self.trigger!r}: a trigger such as Every(seconds=3600)", field="trigger"
            )
        gate_of(self.gate)
        if self.data not in DATA:
            raise ParameterError(f"data={self.data!r}: 'all' or 'new'", field="data")
        if self.max_wait is not None:
            check_seconds("max_wait", self.max_wait)
        for field in ("warm_start", "paused"):
            check_flag(field, getattr(self, field))

    @property
    def effective_trigger(self) -> Trigger:
        """The trigger, and with `max_wait` the waiting of documents as well."""
        if self.max_wait is None:
            return self.trigger
        counts = CHANGED if CHANGED in self.trigger.watches else INSERTED
        return AnyOf(self.trigger, Waited(self.max_wait, counts))
