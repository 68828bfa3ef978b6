"""The picture of a run: samples a second of every contender.

Always: matplotlib is looked for when a picture is asked for, so that the numbers do not need it.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any


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
