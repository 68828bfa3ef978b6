"""Names what a validation measures: metrics, and datasets besides the fold `valid`.

All three are frozen values; what a metric accumulates over batches lives in a `RunningMetric` of one evaluation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, final

from mongotorch.component import Component
from mongotorch.errors import ParameterError
from mongotorch.query import Query
from mongotorch.signature import OBJECTIVE

MODES = ("min", "max")


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Metric(Component):
    """A number that says how good a model is.

    Args:
        identifier: Its name, under which it is measured and listened to; not `objective`.
        db: The datalayer that `apply()` uses; never stored.
        uuid: The identity of the version it becomes; made when none is given.
        artifacts: `{field: codec name}`, over the default choice of codec.
        object: A callable `(output, target) -> float`, whose values over batches are averaged by the number of
            samples, or a torchmetrics object (anything with `update`, `compute` and `reset`).
        mode: `max` where more is better, `min` where less is; None asks a torchmetrics object's
            `higher_is_better`, and is `max` for a callable.

    Raises:
        IdentifierError: The identifier is none.
        ParameterError: The object cannot be called, or the mode does not exist.
    """

    type_id: ClassVar[str] = "metric"

    object: Any
    mode: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.identifier == OBJECTIVE:
            raise ParameterError(f"a metric cannot be called {OBJECTIVE!r}: that is the loss", field="identifier")
        if not callable(self.object):
            raise ParameterError("object must be callable: (output, target) -> float", field="object")
        if self.mode not in (None, *MODES):
            raise ParameterError(f"mode={self.mode!r}: 'min', 'max' or None", field="mode")

    @property
    def higher_is_better(self) -> bool:
        """Whether more is better."""
        if self.mode is not None:
            return self.mode == "max"
        return getattr(self.object, "higher_is_better", True) is not False


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Dataset(Component):
    """A named set of documents, to validate on.

    Args:
        identifier: Its name.
        db: The datalayer that `apply()` uses; never stored.
        uuid: The identity of the version it becomes; made when none is given.
        artifacts: `{field: codec name}`, over the default choice of codec.
        select: The documents, of whatever fold.

    Raises:
        IdentifierError: The identifier is none.
        ParameterError: The select is no query.
    """

    type_id: ClassVar[str] = "dataset"

    select: Query

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.select, Query):
            raise ParameterError('select must be a query, such as db["name"].find()', field="select")


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Validation(Component):
    """What is measured besides the objective, and on which datasets besides the fold `valid`.

    Args:
        identifier: Its name.
        db: The datalayer that `apply()` uses; never stored.
        uuid: The identity of the version it becomes; made when none is given.
        artifacts: `{field: codec name}`, over the default choice of codec.
        metrics: The metrics.
        datasets: The datasets; what is measured on one is called `dataset/metric`.

    Raises:
        IdentifierError: The identifier is none.
        ParameterError: Something else among them, or two of one name.
    """

    type_id: ClassVar[str] = "validation"

    metrics: Sequence[Metric] = ()
    datasets: Sequence[Dataset] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, kind in (("metrics", Metric), ("datasets", Dataset)):
            parts = getattr(self, field)
            if not isinstance(parts, list | tuple) or not all(isinstance(part, kind) for part in parts):
                raise ParameterError(f"{field} must be a list of {kind.__name__}", field=field)
            names = [part.identifier for part in parts]
            if len(set(names)) < len(names):
                raise ParameterError(f"{field}: two are called the same: {sorted(names)}", field=field)

    def higher_is_better(self, name: str) -> bool | None:
        """Whether more of a measured value is better; None where nothing of that name is measured."""
        dataset, _, metric = name.rpartition("/")
        if dataset and dataset not in [part.identifier for part in self.datasets]:
            return None
        if metric == OBJECTIVE:
            return False
        return next((part.higher_is_better for part in self.metrics if part.identifier == metric), None)
