"""What was measured of two models, and what a gate says of it.

Always: both are plain in the end: what is stored of them any client can read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np

from mongotorch.errors import ParameterError
from mongotorch.run.bootstrap import Losses

OBJECTIVE = "objective"


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """What was measured of one model.

    Args:
        losses: The objective of each document, in the same order for the models that are compared.
        values: `{name: value}` over all of them: the objective and the metrics.
    """

    losses: Sequence[float]
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def to_document(self) -> dict[str, float]:
        """The values, the mean loss as `objective` where it is not among them."""
        mean = {} if len(self.losses) == 0 else {OBJECTIVE: mean_of(losses_of(self.losses))}
        return {**mean, **{name: float(value) for name, value in self.values.items()}}


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a gate says, and on what grounds.

    Args:
        promote: Whether the challenger is to be served.
        why: The reason, a sentence.
        gate: The gate, as one would write it.
        documents: How many documents both were scored on; 0 where the gate needs no scores.
        champion: The values of what is served now; None where nothing is, or it was not scored.
        challenger: The values of what was trained; empty where it was not scored.
        interval: The confidence interval of how much lower its mean loss is; None where none was asked for.
    """

    promote: bool
    why: str
    gate: str
    documents: int = 0
    champion: Mapping[str, float] | None = None
    challenger: Mapping[str, float] = dataclasses.field(default_factory=dict)
    interval: tuple[float, float] | None = None

    def to_document(self) -> dict[str, Any]:
        """Plain BSON."""
        said = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **said,
            "champion": None if self.champion is None else dict(self.champion),
            "challenger": dict(self.challenger),
            "interval": None if self.interval is None else list(self.interval),
        }


def losses_of(losses: Sequence[float]) -> Losses:
    """The losses as an array. Raises: ParameterError when they are not one number a document."""
    array = np.asarray(losses, dtype=np.float64)
    if array.ndim != 1:
        raise ParameterError(f"losses have the shape {array.shape}; give one number a document", field="losses")
    return array


def mean_of(losses: Losses) -> float:
    """Their mean; not finite where one is not, or where their sum is beyond what a float holds."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(losses.mean())
