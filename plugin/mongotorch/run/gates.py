"""Whether what a run trained is to be served: champion and challenger, scored on the same documents.

Always: a gate is a frozen value and its judgement a pure function of the scores, the same for the same scores;
what cannot be compared is never promoted silently, and each verdict says why in a sentence.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, final

import numpy as np

from mongotorch.errors import ParameterError
from mongotorch.run.bootstrap import Losses, interval_of_mean
from mongotorch.run.scores import Scores, Verdict, losses_of, mean_of
from mongotorch.run.triggers.base import is_number


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
