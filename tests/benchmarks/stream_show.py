"""The rows of a run: on the terminal, as the table of a page, and as a picture.

Always: matplotlib is looked for when a picture is asked for, so that the numbers do not need it.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_MARKS = ("<!-- results -->", "<!-- end of results -->")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; `value` None was not measured, and `note` says why."""

    what: str
    value: float | None
    target: float | None = None
    most: bool = False
    unit: str = "x"
    note: str = ""

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """What, measured, target, whether it is met, note."""
        value = "-" if self.value is None else f"{self.value:.2f} {self.unit}"
        target = "" if self.target is None else f"{'<=' if self.most else '>='} {self.target:g}"
        return self.what, value, target, {None: "", True: "met", False: "below"}[self.met], self.note

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        if self.value is None or self.target is None:
            return None
        return self.value <= self.target if self.most else self.value >= self.target


def show(rows: list[Row], rates: dict[str, float], console: Console) -> None:
    """The table."""
    table = Table(title="mongotorch stream")
    for title in ("what", "measured", "target", "", "note"):
        table.add_column(title, justify="right" if title in ("measured", "target") else "left")
    for row in rows:
        what, value, target, met, note = row.cells
        color = {"met": "green", "below": "red"}.get(met, "white")
        table.add_row(what, value, target, f"[{color}]{met}[/]", note)
    table.add_section()
    for name, rate in rates.items():
        table.add_row(name, f"{rate / 1000:,.0f} k/s", "", "", "samples a second, this machine, this run")
    console.print(table)


def write_page(path: Path, rows: list[Row], content: Mapping[str, Any]) -> None:
    """Put the table between the marks of a page, if there is such a page."""
    if not path.exists():
        return
    machine, settings = content["machine"], content["settings"]
    head = (
        f"{content['when']}: {settings['docs']:,} documents, {settings['rounds']} rounds, "
        f"torch {settings['torch']}, {machine['cores']} cores with a load of {machine['load']:.1f} "
        "from this and from others."
    )
    lines = ["| what | measured | target | | note |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(row.cells) + " |" for row in rows]
    text = path.read_text(encoding="utf-8")
    table = "\n".join([_MARKS[0], head, "", *lines, _MARKS[1]])
    found = re.compile(f"{_MARKS[0]}.*{_MARKS[1]}", re.DOTALL)
    path.write_text(found.sub(lambda _: table, text), encoding="utf-8")


def plot(rates: dict[str, float], path: Path) -> bool:
    """Draw bars; False where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    importlib.import_module("matplotlib").use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    names = sorted(rates, key=rates.__getitem__)
    figure, axes = pyplot.subplots(figsize=(8, 0.32 * len(names) + 1))
    ours = ("stream", "load", "in_memory", "download", "decode")
    colors = ["#00684a" if name.split(": ")[1].startswith(ours) else "#b8c4c2" for name in names]
    axes.barh(names, [rates[name] / 1000 for name in names], color=colors)
    axes.set_xscale("log")
    axes.set_xlabel("thousand samples a second, logarithmic (green: mongotorch)")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
