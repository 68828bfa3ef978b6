"""What a run measured, as a value: rows to iterate, a table, a data frame, a plot, and new rows as they come."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple, final

from mongotorch.errors import UnsupportedError

_SHOWN_ROWS: Final = 10
_SHOWN_COLUMNS: Final = 6
_WIDTH: Final = 80  # characters of a line of the text


class MetricRow(NamedTuple):
    """One row of what a run measured.

    Attributes:
        step: The number of optimizer steps taken.
        kind: `train`, means over the steps since the row before; or `valid`, of one validation.
        values: The measured values by name.
        time: When, by the database's clock, naive UTC.
    """

    step: int
    kind: str
    values: Mapping[str, float]
    time: datetime


Follow = Callable[[set[tuple[int, str]]], Iterator[MetricRow]]
"""From the step and kind of rows that are known to the further ones, until the run has ended."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class RunMetrics:
    """What a run measured, as it was when this was read; `db.metrics` gives it.

    Iterating gives the rows by step: `for step, kind, values, time in db.metrics(job)`.

    Attributes:
        job: The job's uuid.
        rows: The rows, by step and kind.
        interval: The most steps that a row of `train` is the mean of. It is `log_interval` at first; a run that
            would keep more than 2,048 rows drops every second one and goes on with twice the interval.
        further: Gives `follow` its rows.
    """

    job: str
    rows: tuple[MetricRow, ...]
    interval: int = 0
    further: Follow | None = dataclasses.field(default=None, compare=False)

    def __iter__(self) -> Iterator[MetricRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def names(self) -> list[str]:
        """The names of all values, in the order in which they first come."""
        return list(dict.fromkeys(name for row in self.rows for name in row.values))

    def curve(self, name: str = "objective", kind: str = "train") -> tuple[list[int], list[float]]:
        """The steps and the values of one name.

        Args:
            name: The name of the value.
            kind: `train` or `valid`.
        """
        of_name = [row for row in self.rows if row.kind == kind and name in row.values]
        return [row.step for row in of_name], [row.values[name] for row in of_name]

    def follow(self) -> Iterator[MetricRow]:
        """The rows that are not in here, as they come, until the run has ended.

        A change stream waits for them; on mongomock and on a standalone server it looks every half a second.

        Raises:
            ServerUnavailableError: The server cannot be reached.
        """
        if self.further is not None:
            yield from self.further({(row.step, row.kind) for row in self.rows})

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a row for each row, and the columns `step`, `kind`, `time` and the names.

        Raises:
            UnsupportedError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UnsupportedError("to_pandas needs pandas: pip install pandas") from error
        records = [{"step": row.step, "kind": row.kind, "time": row.time, **row.values} for row in self.rows]
        return pandas.DataFrame(records, columns=list(dict.fromkeys(["step", "kind", "time", *self.names])))

    def plot(self, *names: str, axes: Any = None) -> Any:
        """Draw curves over the steps with matplotlib, one for each name and kind.

        Args:
            names: What is drawn; `objective` unless given.
            axes: Where; None makes new ones.

        Returns:
            The axes, `matplotlib.axes.Axes`.

        Raises:
            UnsupportedError: matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise UnsupportedError("plot needs matplotlib: pip install 'mongotorch[plot]'") from error
        drawn = pyplot.subplots(layout="constrained")[1] if axes is None else axes
        for name in names or ("objective",):
            for kind in ("train", "valid"):
                steps, values = self.curve(name, kind)
                if steps:
                    drawn.plot(steps, values, label=f"{kind} {name}", marker="o" if len(steps) < 2 else None)
        drawn.set_xlabel("step")
        if drawn.get_legend_handles_labels()[1]:
            drawn.legend()
        return drawn

    def __repr__(self) -> str:
        lines = [self._title()]
        cells = self._cells()
        if cells:
            widths = [max(len(line[n]) for line in cells) for n in range(len(cells[0]))]
            fit = [n for n in range(len(widths)) if sum(widths[: n + 1]) + 2 * n <= _WIDTH]
            cells = [line[: len(fit)] for line in cells]
            lines += ["  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=False)) for line in cells]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head, *body = self._cells() or [[]]
        rows = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
        rows += ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in body]
        table = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<p>{html.escape(self._title())}</p><table>{table}</table>"

    def _title(self) -> str:
        if not self.rows:
            return f"RunMetrics of job {self.job}: no rows"
        every = f", a train row every {self.interval} steps at most" if self.interval else ""
        steps = f"steps {self.rows[0].step} to {self.rows[-1].step}"
        return f"RunMetrics of job {self.job}: {len(self.rows)} rows, {steps}{every}"

    def _cells(self) -> list[list[str]]:
        """The newest rows as text, with a line of headings."""
        if not self.rows:
            return []
        names = self.names
        shown = names[:_SHOWN_COLUMNS]
        head = ["step", "kind", *shown, *(["…"] if len(names) > len(shown) else [])]
        left_out = [["…", *[""] * (len(head) - 1)]] if len(self.rows) > _SHOWN_ROWS else []
        return [head, *left_out, *(_line(row, shown, len(head)) for row in self.rows[-_SHOWN_ROWS:])]


def _line(row: MetricRow, names: Sequence[str], width: int) -> list[str]:
    cells = [f"{row.values[name]:.5g}" if name in row.values else "" for name in names]
    return [str(row.step), row.kind, *cells, *[""] * (width - 2 - len(cells))]
