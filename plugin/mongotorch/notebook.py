"""Writes what notebooks show of a value: small tables and curves in HTML, every text escaped and cut."""

from __future__ import annotations

import html
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar, final

T = TypeVar("T")
_MOST_ITEMS: Final = 10
_LONGEST: Final = 300  # characters of a cell
_MOST_ROWS: Final = 50
_WIDTH: Final = 360
_HEIGHT: Final = 120
_MOST_DRAWN: Final = 400  # points of a curve
_COLORS: Final = ("#13795b", "#b3541e", "#3f5bc0", "#9b2f8e")


@final
class ShownList(list[T]):
    """A list that a notebook shows as a table, and that prints its first ten items at most.

    Args:
        items: The items.
        table: Makes the HTML, when it is asked for.
    """

    def __init__(self, items: Iterable[T], table: Callable[[], str]) -> None:
        super().__init__(items)
        self._table = table

    def __repr__(self) -> str:
        if len(self) <= _MOST_ITEMS:
            return super().__repr__()
        first = ", ".join(map(repr, self[:_MOST_ITEMS]))
        return f"[{first}, … and {len(self) - _MOST_ITEMS:,} more]"

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)  # elsewhere there is nothing to read the table from

    def _repr_html_(self) -> str:
        return self._table()


def is_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def cut(value: Any, most: int = _LONGEST) -> str:
    """The text of a value on one line, cut after so many characters."""
    text = " ".join(str(value)[: 4 * most].split())
    return text if len(text) <= most else text[: most - 1] + "…"


def html_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table with a title.

    Args:
        title: What it is of; the empty text shows none.
        columns: The headings; without any there is no line of headings.
        rows: The cells; rows behind the fiftieth are counted only.
    """
    lines = [list(row) for row in rows]
    shown = ["<tr>" + "".join(f"<th>{_escaped(column)}</th>" for column in columns) + "</tr>"] if columns else []
    shown += ["<tr>" + "".join(_cell(cell) for cell in line) + "</tr>" for line in lines[:_MOST_ROWS]]
    more = f"<p>… and {len(lines) - _MOST_ROWS:,} more</p>" if len(lines) > _MOST_ROWS else ""
    heading = f"<p><b>{_escaped(title)}</b></p>" if title else ""
    return f"{heading}<table>{''.join(shown)}</table>{more}"


def html_pairs(title: str, pairs: Iterable[tuple[str, Any]]) -> str:
    """A table of names and values; values that are None are left out."""
    return html_table(title, (), [pair for pair in pairs if pair[1] is not None])


def html_curves(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Curves by name, each of its x and y, as a drawing with a legend; the empty text where there is none."""
    drawn = {name: _finite(*curve) for name, curve in curves.items()}
    drawn = {name: pairs for name, pairs in drawn.items() if len(pairs) > 1}
    if not drawn:
        return ""
    xs = [x for pairs in drawn.values() for x, _ in pairs]
    ys = [y for pairs in drawn.values() for _, y in pairs]
    wide, tall = (max(xs) - min(xs)) or 1.0, (max(ys) - min(ys)) or 1.0
    lines, legend = [], []
    for n, (name, pairs) in enumerate(drawn.items()):
        color = _COLORS[n % len(_COLORS)]
        across = [4 + (x - min(xs)) / wide * (_WIDTH - 8) for x, _ in pairs]
        down = [_HEIGHT - 4 - (y - min(ys)) / tall * (_HEIGHT - 8) for _, y in pairs]
        where = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))
        lines.append(f'<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{where}"/>')
        legend.append(f'<span style="color:{color}">{_escaped(name)} {pairs[-1][1]:.4g}</span>')
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    return f'<svg {size} role="img">{"".join(lines)}</svg><p>{", ".join(legend)}</p>'


def _finite(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    pairs = [(x, y) for x, y in zip(xs, ys, strict=False) if math.isfinite(x) and math.isfinite(y)]
    every = max(-(-len(pairs) // _MOST_DRAWN), 1)
    return [*pairs[:-1:every], pairs[-1]] if pairs else []


def _cell(value: Any) -> str:
    return f'<td style="text-align:left">{_escaped(value)}</td>'


def _escaped(value: Any) -> str:
    return html.escape(cut(value))
