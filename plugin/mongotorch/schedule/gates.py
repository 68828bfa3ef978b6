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
from typing import Any, ClassVar, Final, final

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
        losses: The objective of each document, in the same order for the models that are compared.
        values: The objective and the metrics over all documents, by name.
    """

    losses: Sequence[float]
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def to_document(self) -> dict[str, float]:
        """The values, with the mean loss as `objective` if they do not contain it. Raises: ParameterError."""
        mean = {} if len(self.losses) == 0 else {OBJECTIVE: _mean(_array(self.losses))}
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
    """

    promote: bool
    why: str
    gate: str
    documents: int = 0
    champion: Mapping[str, float] | None = None
    challenger: Mapping[str, float] = dataclasses.field(default_factory=dict)
    interval: tuple[float, float] | None = None

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
            documents=0 if challenger is None else len(challenger.losses),
            champion=None if champion is None else champion.to_document(),
            challenger={} if challenger is None else challenger.to_document(),
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
            documents).

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
        theirs = _array(challenger.losses)
        if not np.isfinite(_mean(theirs)):
            return self.verdict(False, f"the trained model's loss {_not_finite(theirs)}", champion, challenger)
        if champion is None:
            return self.verdict(True, "nothing is live yet", champion, challenger)
        ours = _array(champion.losses)
        if ours.shape != theirs.shape:
            raise ParameterError(
                f"the live model was scored on {len(ours):,} documents and the trained one on {len(theirs):,}; "
                "score both on the same",
                field="losses",
            )
        if not np.isfinite(_mean(ours)):
            return self.verdict(True, f"the live model's loss {_not_finite(ours)}", champion, challenger)
        interval = None if self.confidence is None else interval_of_mean(ours - theirs, self.confidence)
        gain = _mean(ours) - _mean(theirs)
        promote = (gain if interval is None else interval[0]) > self.margin
        why = self._reason(_mean(ours), _mean(theirs), len(ours), interval, promote)
        return dataclasses.replace(self.verdict(promote, why, champion, challenger), interval=interval)

    def _reason(
        self, ours: float, theirs: float, documents: int, interval: tuple[float, float] | None, promote: bool
    ) -> str:
        gain = ours - theirs
        compared = "equal" if gain == 0 else f"{'better' if gain > 0 else 'worse'} by {abs(gain):.4g}"
        reason = f"mean loss {theirs:.4g} against the champion's {ours:.4g} on {documents:,} documents: {compared}"
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


def interval_of_mean(differences: Losses, confidence: float) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean, from 10,000 resamples with replacement.

    Takes about a second for every 10,000 differences, and a bounded amount of memory.

    Args:
        differences: One finite number a document, shape (documents,), float64. A single one has no interval.
        confidence: The share of the resampled means that lie within the interval, between 0 and 1.

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
        drawn = differences[generator.integers(0, number, size, dtype=np.uint32)]
        means[start : start + rows] = drawn.mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _array(losses: Sequence[float]) -> Losses:
    array = np.asarray(losses, dtype=np.float64)
    if array.ndim != 1:
        raise ParameterError(f"losses have the shape {array.shape}; give one number a document", field="losses")
    return array


def _mean(losses: Losses) -> float:
    """The mean; not finite where a loss is not, or where their sum is beyond what a float can hold."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(losses.mean())


def _not_finite(losses: Losses) -> str:
    number = int(np.count_nonzero(~np.isfinite(losses)))
    return f"is not finite on {number:,} of {len(losses):,} documents" if number else "has no finite mean"
