"""Decides whether a trained model goes live: gates compare the scores of champion and challenger.

The champion is the live model, the challenger the one that was just trained; both are scored on the same
documents.

Guarantees: a gate is a frozen value and `judge` a pure function: the same scores give the same verdict on any
machine; models that cannot be compared are never promoted silently; each verdict gives its reason in a sentence.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, Literal, final

import numpy as np
from numpy.typing import NDArray

from mongotorch.errors import ParameterError
from mongotorch.schedule.triggers.base import is_number
from mongotorch.signature import OBJECTIVE

Losses = NDArray[np.float64]
RESAMPLES: Final = 10_000
_MAX_DRAWS = 2**22  # at a time: 16 MiB of indices and 32 MiB of values
_SEED: Final = 0


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """What was measured of one model.

    Args:
        losses: The objective of each unit, in the same order for the models that are compared.
        values: The objective and the metrics over all documents, by name.
        unit: What the losses are of: `documents`, or `batches` where the objective of a batch is no mean over its
            documents.
        weights: What each loss counts in the mean; None: all the same.
        documents: How many documents they are of; None: as many as there are losses.
    """

    losses: Sequence[float]
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)
    unit: Literal["documents", "batches"] = "documents"
    weights: Sequence[float] | None = None
    documents: int | None = None

    @property
    def mean(self) -> float:
        """The weighted mean of the losses; NaN without any. Raises: ParameterError."""
        if len(self.losses) == 0:
            return float("nan")
        return _mean(_array(self.losses), _weights(self))

    def to_document(self) -> dict[str, float]:
        """The values, with the mean loss as `objective` if they do not contain it. Raises: ParameterError."""
        mean = {} if len(self.losses) == 0 else {OBJECTIVE: self.mean}
        return {**mean, **{name: float(value) for name, value in self.values.items()}}


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The decision of a gate, and its grounds.

    Args:
        promote: Whether the challenger goes live.
        why: The reason, a sentence.
        gate: The gate, as its `repr`.
        documents: How many documents both were scored on; 0 where the gate needs no scores.
        champion: The values of the live model; None where nothing is live, or it was not scored.
        challenger: The values of the trained model; empty where it was not scored.
        interval: The confidence interval of the champion's mean loss minus the challenger's; None where the gate
            asks for none.
        unit: What they were compared by: `documents`, or `batches`; see `Scores`.
    """

    promote: bool
    why: str
    gate: str
    documents: int = 0
    champion: Mapping[str, float] | None = None
    challenger: Mapping[str, float] = dataclasses.field(default_factory=dict)
    interval: tuple[float, float] | None = None
    unit: Literal["documents", "batches"] = "documents"

    def to_document(self) -> dict[str, Any]:
        """The fields as plain BSON."""
        return {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "champion": None if self.champion is None else dict(self.champion),
            "challenger": dict(self.challenger),
            "interval": None if self.interval is None else list(self.interval),
        }


class Gate(abc.ABC):
    """Decides whether a trained model goes live. A new one is a frozen dataclass that inherits this class."""

    __mongotorch_value__: ClassVar[bool] = True

    @property
    def needs_scores(self) -> bool:
        """Whether the models have to be scored before it can judge."""
        return True

    @abc.abstractmethod
    def judge(self, champion: Scores | None, challenger: Scores | None) -> Verdict:
        """The verdict on two models.

        Args:
            champion: The scores of the live model; None where nothing is live.
            challenger: The scores of the trained model, on the same documents; None where `needs_scores` is False.

        Raises:
            ParameterError: The two were not scored on the same documents, or a function did not return a bool.
        """

    def verdict(self, promote: bool, why: str, champion: Scores | None, challenger: Scores | None) -> Verdict:
        """A verdict of this gate, with the scores as they are stored.

        Args:
            promote: Whether the challenger goes live.
            why: The reason, a sentence.
            champion: As given to `judge`.
            challenger: As given to `judge`.
        """
        return Verdict(
            promote=promote,
            why=why,
            gate=repr(self),
            documents=0 if challenger is None else _documents(challenger),
            champion=None if champion is None else champion.to_document(),
            challenger={} if challenger is None else challenger.to_document(),
            unit="documents" if challenger is None else challenger.unit,
        )


@final
@dataclasses.dataclass(frozen=True)
class Always(Gate):
    """Promotes every trained model, without scoring it."""

    @property
    def needs_scores(self) -> bool:
        """False."""
        return False

    def judge(self, champion: Scores | None, challenger: Scores | None) -> Verdict:
        """Promotes; see `Gate.judge`."""
        return self.verdict(True, "every trained model goes live", champion, challenger)


@final
@dataclasses.dataclass(frozen=True)
class Never(Gate):
    """Promotes no trained model (a shadow); a person decides, with the scores at hand."""

    @property
    def needs_scores(self) -> bool:
        """True: the person who decides needs them."""
        return True

    def judge(self, champion: Scores | None, challenger: Scores | None) -> Verdict:
        """Does not promote; see `Gate.judge`."""
        return self.verdict(False, "no trained model goes live by itself; promote it", champion, challenger)


@final
@dataclasses.dataclass(frozen=True)
class Better(Gate):
    """Promotes a trained model whose mean loss is lower than that of the live one, on the same documents.

    Where nothing is live, it is promoted. A challenger with a loss that is not finite never is; a champion with
    such a loss is replaced.

    Args:
        margin: By how much the mean loss has to be lower, in its own unit; 0 promotes any that is lower.
        confidence: None compares the means. A number between 0 and 1, such as 0.95, promotes only where the lower
            end of that confidence interval of the difference is above the margin (a paired bootstrap over
            documents, or over batches where the objective is no mean over documents).

    Raises:
        ParameterError: An argument cannot be used; `field` names it.
    """

    margin: float = 0.0
    confidence: float | None = None

    def __post_init__(self) -> None:
        if not is_number(self.margin):
            raise ParameterError(f"margin={self.margin!r}: it must be a finite number", field="margin")
        if self.confidence is not None and not (is_number(self.confidence) and 0 < self.confidence < 1):
            raise ParameterError(
                f"confidence={self.confidence!r}: a number between 0 and 1, or None", field="confidence"
            )

    def judge(self, champion: Scores | None, challenger: Scores | None) -> Verdict:
        """Promotes a challenger that is better by more than the margin; see `Gate.judge`."""
        if challenger is None or len(challenger.losses) == 0:
            return self.verdict(False, "the trained model was not scored on any document", champion, challenger)
        theirs, theirs_mean = _array(challenger.losses), challenger.mean
        if not np.isfinite(theirs_mean):
            why = f"the trained model's loss {_not_finite(theirs, challenger.unit)}"
            return self.verdict(False, why, champion, challenger)
        if champion is None:
            return self.verdict(True, "nothing is live yet", champion, challenger)
        ours = _array(champion.losses)
        _check_same(champion, challenger)
        if not np.isfinite(champion.mean):
            why = f"the live model's loss {_not_finite(ours, champion.unit)}"
            return self.verdict(True, why, champion, challenger)
        interval = None
        if self.confidence is not None:
            interval = interval_of_mean(ours - theirs, self.confidence, _weights(challenger))
        gain = champion.mean - theirs_mean
        promote = (gain if interval is None else interval[0]) > self.margin
        why = self._reason(champion.mean, challenger, interval, promote)
        return dataclasses.replace(self.verdict(promote, why, champion, challenger), interval=interval)

    def _reason(self, ours: float, challenger: Scores, interval: tuple[float, float] | None, promote: bool) -> str:
        theirs = challenger.mean
        gain = ours - theirs
        compared = "equal" if gain == 0 else f"{'better' if gain > 0 else 'worse'} by {abs(gain):.4g}"
        on = f"{_documents(challenger):,} documents"
        if challenger.unit == "batches":
            on += f" in {len(challenger.losses):,} batches"
        reason = f"mean loss {theirs:.4g} against the champion's {ours:.4g} on {on}: {compared}"
        if interval is not None:
            percent = f"{100 * (self.confidence or 0):.4g}"
            reason += f" ({percent} % interval {interval[0]:.4g} to {interval[1]:.4g})"
        if promote or gain < 0 or (gain == 0 and self.margin >= 0):
            return reason
        lacking = f"the margin of {self.margin:.4g}" if self.margin else "nothing"
        return f"{reason}, which is not {'surely ' if interval is not None else ''}more than {lacking}"


@final
@dataclasses.dataclass(frozen=True)
class Asked(Gate):
    """Decides by a function `(champion, challenger) -> bool`.

    Args:
        function: Called with the `Scores` of both; None for a champion where nothing is live.
    """

    function: Callable[[Scores | None, Scores | None], bool]

    def __repr__(self) -> str:
        return str(getattr(self.function, "__qualname__", self.function))

    def judge(self, champion: Scores | None, challenger: Scores | None) -> Verdict:
        """Promotes if the function returns True; see `Gate.judge`."""
        answer = self.function(champion, challenger)
        if not isinstance(answer, bool | np.bool_):
            raise ParameterError(f"gate {self!r} gave {answer!r}; let it give True or False", field="gate")
        return self.verdict(bool(answer), f"{self!r} said {'yes' if answer else 'no'}", champion, challenger)


def gate_of(value: Any) -> Gate:
    """The gate of a value: a `Gate` itself, or a function `(champion, challenger) -> bool`.

    Raises:
        ParameterError: It is neither.
    """
    if isinstance(value, Gate):
        return value
    if isinstance(value, type) or not callable(value):
        raise ParameterError(
            f"gate={value!r}: a gate such as Better(), or a function (champion, challenger) -> bool", field="gate"
        )
    return Asked(value)


def interval_of_mean(differences: Losses, confidence: float, weights: Losses | None = None) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean, from 10,000 resamples with replacement.

    Takes about a second for every 10,000 differences, and a bounded amount of memory.

    Args:
        differences: One finite number a unit (a document or a batch), shape (units,), float64. A single one has no
            interval.
        confidence: The share of the resampled means that lie within the interval, between 0 and 1.
        weights: What each counts in the mean, above 0, shape (units,); None: all the same.

    Returns:
        Its lower and upper end; -inf and inf for fewer than two differences.

    Source: B. Efron, R. J. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile intervals).
    """
    number = len(differences)
    if number < 2:
        return -np.inf, np.inf
    generator = np.random.default_rng(_SEED)
    rows = max(1, min(RESAMPLES, _MAX_DRAWS // number))
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, rows):
        size = (min(rows, RESAMPLES - start), number)
        at = generator.integers(0, number, size, dtype=np.uint32)
        if weights is None:
            means[start : start + rows] = differences[at].mean(axis=1)
        else:
            means[start : start + rows] = (differences * weights)[at].sum(axis=1) / weights[at].sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _documents(scores: Scores) -> int:
    return len(scores.losses) if scores.documents is None else scores.documents


def _check_same(champion: Scores, challenger: Scores) -> None:
    """Refuse scores of other documents. Raises: ParameterError."""
    units = [f"{len(scores.losses):,} {scores.unit}" for scores in (champion, challenger)]
    if units[0] != units[1]:
        raise ParameterError(
            f"the live model was scored on {units[0]} and the trained one on {units[1]}; score both on the same",
            field="losses",
        )
    ours, theirs = _weights(champion), _weights(challenger)
    if ours is not theirs and (ours is None or theirs is None or not np.array_equal(ours, theirs)):
        raise ParameterError(
            f"what the {champion.unit} count differs between the live model and the trained one; "
            "score both on the same targets",
            field="weights",
        )


def _array(losses: Sequence[float]) -> Losses:
    array = np.asarray(losses, dtype=np.float64)
    if array.ndim != 1:
        raise ParameterError(f"losses have the shape {array.shape}; give one number a document", field="losses")
    return array


def _weights(scores: Scores) -> Losses | None:
    """The weights of scores; None where all are the same. Raises: ParameterError."""
    if scores.weights is None:
        return None
    array = np.asarray(scores.weights, dtype=np.float64)
    if array.shape != (len(scores.losses),) or not (array > 0).all():
        raise ParameterError("weights: give one number above 0 for each loss", field="weights")
    return None if not array.size or (array == array[0]).all() else array


def _mean(losses: Losses, weights: Losses | None) -> float:
    """The mean; not finite where a loss is not, or where their sum is beyond what a float can hold."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(losses.mean() if weights is None else (losses * weights).sum() / weights.sum())


def _not_finite(losses: Losses, unit: str) -> str:
    number = int(np.count_nonzero(~np.isfinite(losses)))
    return f"is not finite on {number:,} of {len(losses):,} {unit}" if number else "has no finite mean"
