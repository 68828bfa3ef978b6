"""Measures what is live on recent documents, for the triggers that look at that.

Always: a measurement that cannot be made is an empty one, with the reason beside it, and is tried again when the
next one is due.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import datetime
from typing import Any, final

from mongotorch.data import Stream
from mongotorch.errors import MongotorchError
from mongotorch.run import Schedule, State, Trigger
from mongotorch.settings import Settings
from mongotorch.store import Connection
from mongotorch.train import TorchModel, score
from mongotorch.wiring.course import pair
from mongotorch.wiring.load import Loader
from mongotorch.wiring.schedules.firings import Firings
from mongotorch.wiring.schedules.judging import Judge
from mongotorch.wiring.streams import validation_spec

Document = Mapping[str, Any]


@final
class Gauges:
    """Measures the live models of one database.

    Args:
        connection: The database.
        settings: Of the datalayer.
        firings: Knows the triggers.
        loader: Loads schedules and models.
        judge: Says what is live.
    """

    def __init__(
        self, *, connection: Connection, settings: Settings, firings: Firings, loader: Loader, judge: Judge
    ) -> None:
        self._connection, self._settings = connection, settings
        self._firings, self._loader, self._judge = firings, loader, judge

    def measure(self, document: Document, now: datetime) -> dict[str, Any]:
        """What a schedule's document has to say after a measurement; empty where none is due."""
        try:
            trigger = self._firings.trigger_of(document["component"])
        except MongotorchError:
            return {}  # who asks the trigger next says so
        state = State.from_document(document["state"])
        every_s = trigger.score_every_s
        if every_s is None or (state.scored is not None and (now - state.scored).total_seconds() < every_s):
            return {}
        try:
            values, problem = self._values(document, trigger), None
        except MongotorchError as error:
            values, problem = {}, f"the live model could not be measured: {error}"
        state = dataclasses.replace(state, scores=values, scored=now)
        return {"state": state.to_document(), "problem": problem}

    def _values(self, document: Document, trigger: Trigger) -> dict[str, float]:
        """The objective and the metrics on the newest documents of the fold `valid`, by `_id`."""
        schedule = self._loader.by_uuid(document["component"])
        assert isinstance(schedule, Schedule)  # noqa: S101 - for the type checker
        trainer, model = pair(schedule.trainer)
        served = self._judge.served(model)
        live = model if served is None else self._loader.by_uuid(served["_id"])
        assert isinstance(live, TorchModel)  # noqa: S101 - for the type checker
        query = trainer.select.fold("valid")
        if not query.is_pipeline:
            query = query.sort("_id", -1).limit(trigger.score_documents or 1000)
        spec = validation_spec(trainer, self._settings, query)
        with Stream(self._connection.opener(), spec, database=self._connection.database) as batches:
            return score(trainer, [live], batches)[0].values
