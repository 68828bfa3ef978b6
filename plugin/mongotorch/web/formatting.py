"""Writes numbers, times and texts for the pages: the filters of the templates.

A value of another type than a filter expects is shown as its text, cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

LONGEST: Final = 160  # characters of a text in a table
_UNITS: Final = ("B", "KB", "MB", "GB", "TB", "PB")
_SPANS: Final = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"))


def short(value: Any, most: int = LONGEST) -> str:
    """A text on one line, cut in the end."""
    text = "" if value is None else str(value)[: 4 * most + 4]
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def number(value: Any) -> str:
    """A number in four digits; whole and large ones in full."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return short(value)
    if abs(value) < 1e12 and (float(value).is_integer() or abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def size(value: Any) -> str:
    """A number of bytes in the unit that suits it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return short(value)
    left = float(value)
    for unit in _UNITS[:-1]:
        if abs(left) < 1000:
            return f"{left:.0f} {unit}" if unit == "B" else f"{left:.1f} {unit}"
        left /= 1000
    return f"{left:.1f} {_UNITS[-1]}"


def duration(value: Any) -> str:
    """Seconds as `12 s`, `3 min`, `2.5 h` or `4.1 d`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return short(value)
    for seconds, unit in _SPANS:
        if value >= 2 * seconds:
            return f"{value / seconds:.0f} {unit}" if unit == "min" else f"{value / seconds:.1f} {unit}"
    return f"{value:.1f} s" if 0 < value < 10 else f"{value:.0f} s"


def time_of(value: Any) -> datetime | None:
    """The time of a text in ISO 8601; None for anything else."""
    if not isinstance(value, str):
        return None
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def ago(value: Any, now: Any) -> str:
    """How long ago a time was, or in how long it will be."""
    moment, then = time_of(value), time_of(now)
    if moment is None or then is None:
        return short(value)
    seconds = (then - moment).total_seconds()
    return f"{duration(seconds)} ago" if seconds >= 0 else f"in {duration(-seconds)}"


def lasted(start: Any, end: Any, now: Any) -> str:
    """How long something lasted that began, and ended or goes on; empty where it has not begun."""
    begun, ended = time_of(start), time_of(end) or time_of(now)
    if begun is None or ended is None:
        return ""
    return duration(max((ended - begun).total_seconds(), 0.0))


def pairs(values: Any, most: int = 4) -> str:
    """The first of some named numbers, as `name value`."""
    if not isinstance(values, Mapping):
        return short(values)
    parts = [f"{short(name, 30)} {number(value)}" for name, value in list(values.items())[:most]]
    return ", ".join([*parts, *(["…"] if len(values) > most else [])])


FILTERS: Final[Mapping[str, Callable[..., Any]]] = {
    "ago": ago,
    "duration": duration,
    "lasted": lasted,
    "number": number,
    "pairs": pairs,
    "short": short,
    "size": size,
}
