"""Whether what a run trained is to be served: champion and challenger, scored on the same documents.

Always: a gate is a frozen value and its judgement a pure function of the scores, the same for the same scores;
what cannot be compared is never promoted silently, and each verdict says why in a sentence.

What was measured of two models, and what a gate says of it.

Always: both are plain in the end: what is stored of them any client can read.

How sure a difference of means is, from the differences of single documents.

Always: the same numbers give the same interval, on any machine; memory is bounded whatever their number.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from mongotorch.errors import ParameterError
from mongotorch.schedule.triggers.base import is_number

Losses = NDArray[np.float64]
RESAMPLES = 10_000
_MOST_DRAWN = 2**22  # at a time: 16 MiB of indices, 32 MiB of values
_SEED = 0


def interval_of_mean(differences: Losses, confidence: float) -> tuple[float, float]:
    """The percentile interval of a mean by the bootstrap, 10,000 resamples with replacement.

    Takes about a second for every 10,000 differences. A single one has no interval: it is -inf to inf.

    Args:
        differences: One number a document, finite.
        confidence: Between 0 and 1: which share of the resampled means lies within.

    Source: B. Efron, R. J. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile intervals).
    """
    number = len(differences)
    if number < 2:
        return -np.inf, np.inf
    generator = np.random.default_rng(_SEED)
    rows = max(1, min(RESAMPLES, _MOST_DRAWN // number))
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, rows):
        size = (min(rows, RESAMPLES - start), number)
        means[start : start + rows] = differences[generator.integers(0, number, size, dtype=np.uint32)].mean(
            axis=1
        )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


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


class Gate(abc.ABC):
    """What decides whether a trained model goes live. A new one is a frozen dataclass in a module of its own."""

    __mongotorch_value__: ClassVar[bool] = True

    @property
    def needs_scores(self) -> bool:
        """Whether the models have to be scored for it."""
        return True

    @abc.abstractmethod
    def judge(self, champion: Scores | None, challenger: Scores | None) -> Verdict:
        """The verdict.

        Args:
            champion: The scores of what is served now; None where nothing is.
            challenger: The scores of what was trained, on the same documents; None where `needs_scores` is False.

        Raises:
            ParameterError: The two were not scored on the same documents, or a function gave no answer.
        """

    def verdict(self, promote: bool, why: str, champion: Scores | None, challenger: Scores | None) -> Verdict:
        """A verdict of this gate, with the scores as they are stored.

        Args:
            promote: Whether the challenger is to be served.
            why: The reason, a sentence.
            champion: As `judge` was given it.
            challenger: As `judge` was given it.
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
    """Every trained model goes live, whatever it is worth."""

    @property
    def needs_scores(self) -> bool:
        """No."""
        return False

    def judge(self, champion: Scores | None, challenger: Scores | None) -> Verdict:
        """Yes; see `Gate.judge`."""
        return self.verdict(True, "every trained model goes live", champion, challenger)


@final
@dataclasses.dataclass(frozen=True)
class Never(Gate):
    """No trained model goes live by itself (a shadow): somebody promotes it."""

    @property
    def needs_scores(self) -> bool:
        """Yes: whoever decides wants to see them."""
        return True

    def judge(self, champion: Scores | None, challenger: Scores | None) -> Verdict:
        """No; see `Gate.judge`."""
        return self.verdict(False, "no trained model goes live by itself; promote it", champion, challenger)


@final
@dataclasses.dataclass(frozen=True)
class Better(Gate):
    """A trained model goes live when its mean loss is lower than that of the live one, on the same documents.

    Where nothing is live, it goes live. One with a loss that is not finite never does; where the live one has
    such a loss, the other goes live.

    Args:
        margin: By how much the mean loss has to be lower, in its own unit; 0: at all, so that an equal model is
            not promoted.
        confidence: None compares the means. A number between 0 and 1, as 0.95, promotes only where the lower end
            of that confidence interval of the difference is above the margin: a paired bootstrap over documents.

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
        """Whether the challenger is better by more than the margin; see `Gate.judge`."""
        if challenger is None or len(challenger.losses) == 0:
            return self.verdict(False, "the trained model was not scored on any document", champion, challenger)
        theirs = losses_of(challenger.losses)
        if not np.isfinite(mean_of(theirs)):
            return self.verdict(False, f"the trained model's loss {_not_finite(theirs)}", champion, challenger)
        if champion is None:
            return self.verdict(True, "nothing is live yet", champion, challenger)
        ours = losses_of(champion.losses)
        if ours.shape != theirs.shape:
            raise ParameterError(
                f"the live model was scored on {len(ours):,} documents and the trained one on {len(theirs):,}; "
                "score both on the same",
                field="losses",
            )
        if not np.isfinite(mean_of(ours)):
            return self.verdict(True, f"the live model's loss {_not_finite(ours)}", champion, challenger)
        interval = None if self.confidence is None else interval_of_mean(ours - theirs, self.confidence)
        gain = mean_of(ours) - mean_of(theirs)
        promote = (gain if interval is None else interval[0]) > self.margin
        why = self._sentence(mean_of(ours), mean_of(theirs), len(ours), interval, promote)
        return dataclasses.replace(self.verdict(promote, why, champion, challenger), interval=interval)

    def _sentence(
        self, ours: float, theirs: float, documents: int, interval: tuple[float, float] | None, promote: bool
    ) -> str:
        gain = ours - theirs
        compared = "equal" if gain == 0 else f"{'better' if gain > 0 else 'worse'} by {abs(gain):.4g}"
        said = f"mean loss {theirs:.4g} against the champion's {ours:.4g} on {documents:,} documents: {compared}"
        if interval is not None:
            percent = f"{100 * (self.confidence or 0):.4g}"
            said += f" ({percent} % interval {interval[0]:.4g} to {interval[1]:.4g})"
        if promote or gain < 0 or (gain == 0 and self.margin >= 0):
            return said
        lacking = f"the margin of {self.margin:.4g}" if self.margin else "nothing"
        return f"{said}, which is not {'surely ' if interval is not None else ''}more than {lacking}"


@final
@dataclasses.dataclass(frozen=True)
class Asked(Gate):
    """A function `(champion, challenger) -> bool` as a gate.

    Args:
        function: Gets the `Scores` of both, None for a champion where nothing is live.
    """

    function: Callable[[Scores | None, Scores | None], bool]

    def __repr__(self) -> str:
        return str(getattr(self.function, "__qualname__", self.function))

    def judge(self, champion: Scores | None, challenger: Scores | None) -> Verdict:
        """What the function says; see `Gate.judge`."""
        answer = self.function(champion, challenger)
        if not isinstance(answer, bool | np.bool_):
            raise ParameterError(f"gate {self!r} gave {answer!r}; let it give True or False", field="gate")
        return self.verdict(bool(answer), f"{self!r} said {'yes' if answer else 'no'}", champion, challenger)


def gate_of(value: Any) -> Gate:
    """A gate as it is, a function `(champion, challenger) -> bool` as a gate.

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


def _not_finite(losses: Losses) -> str:
    number = int(np.count_nonzero(~np.isfinite(losses)))
    return f"is not finite on {number:,} of {len(losses):,} documents" if number else "has no finite mean"
