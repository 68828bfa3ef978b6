"""How many documents of the plan were there, and how many were gone.

Always: counting costs one number a range and no question to the server. What a range should hold is known from
the plan where it was walked, else from the first time that this stream read the range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from mongotorch.data.plan import Plan


@final
@dataclass(frozen=True, kw_only=True)
class Report:
    """What the current epoch of a stream (or the last one) has read so far, in this process.

    `gone` and `late` are net numbers of each range: a document that came and one that went in the same range
    cancel out.

    Attributes:
        epoch: The epoch.
        rows: Documents read.
        gone: Documents that the plan, or an earlier epoch, had in the ranges read, and that are not there now.
        late: Documents in them that are new since: inserted, or changed so that they match, with an `_id`
            inside the plan's bounds.
    """

    epoch: int = 0
    rows: int = 0
    gone: int = 0
    late: int = 0


@final
class Tally:
    """Counts for a `Report`.

    Args:
        plan: Whose ranges are read; None where documents come in an order of their own, and only rows count.
    """

    def __init__(self, plan: Plan | None = None) -> None:
        self._plan = plan
        self._seen: dict[int, int] = {}
        self.report = Report()

    def begin(self, epoch: int) -> None:
        """An epoch starts, or goes on after a resume."""
        self.report = Report(epoch=epoch)

    def add(self, index: int, rows: int) -> None:
        """A range was read, and had so many rows."""
        expected = rows
        if self._plan is not None:
            counted = self._plan.counted(index)
            expected = self._seen.setdefault(index, rows) if counted is None else counted
        before = self.report
        self.report = Report(
            epoch=before.epoch,
            rows=before.rows + rows,
            gone=before.gone + max(expected - rows, 0),
            late=before.late + max(rows - expected, 0),
        )
