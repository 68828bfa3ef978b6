"""Lays out the graph of a lineage for drawing: where each box and each line is, in pixels of an SVG.

A column is a kind of node (data, run, version, alias, predictions), a row is a generation: the version itself is
on top, what it began from is below.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from mongotorch.web.formatting import short

_COLUMNS: Final = {"query": 0, "run": 1, "version": 2, "gone": 2, "alias": 3, "predictions": 4}
_WIDTH: Final = 190
_GAP: Final = 46
_LINE: Final = 17
_PADDING: Final = 10
_BETWEEN: Final = 12
_ROWS: Final = 40
_LETTERS: Final = 26  # of a line in a box
Box = dict[str, Any]


def layout(nodes: Iterable[Mapping[str, Any]], edges: Iterable[Sequence[str]]) -> dict[str, Any]:
    """The drawing of a graph.

    Args:
        nodes: As `Overview.lineage` gives them.
        edges: Pairs of ids.

    Returns:
        `width`, `height`, `boxes` (a node with `x`, `y`, `width`, `height` and cut `texts`), and `paths`, each in
        the language of SVG.
    """
    boxes = [_box(node) for node in nodes]
    rows: dict[int, dict[int, list[Box]]] = defaultdict(lambda: defaultdict(list))
    for box in boxes:
        rows[box["generation"]][_COLUMNS.get(box["kind"], 2)].append(box)
    top = 4
    for generation in sorted(rows):
        tallest = 0
        for column, stack in rows[generation].items():
            y = top
            for box in stack:
                box["x"], box["y"] = 4 + column * (_WIDTH + _GAP), y
                y += box["height"] + _BETWEEN
            tallest = max(tallest, y - top - _BETWEEN)
        top += tallest + _ROWS
    by_id = {box["id"]: box for box in boxes}
    paths = [_path(by_id[one], by_id[other]) for one, other in edges if one in by_id and other in by_id]
    columns = 5 if any(box["kind"] == "predictions" for box in boxes) else 4
    width = columns * _WIDTH + (columns - 1) * _GAP + 8
    return {"width": width, "height": max(top - _ROWS + 4, 40), "boxes": boxes, "paths": paths}


def _box(node: Mapping[str, Any]) -> Box:
    lines = [short(text, _LETTERS) for text in (node["title"], *node["lines"][:4])]
    texts = [{"text": text, "dy": _PADDING + _LINE * (n + 1) - 5} for n, text in enumerate(lines)]
    return {**node, "texts": texts, "width": _WIDTH, "height": 2 * _PADDING + _LINE * len(lines), "x": 0, "y": 0}


def _path(one: Box, other: Box) -> str:
    if one["generation"] > other["generation"]:  # from an older version up to the run that began from it
        x1, y1 = one["x"] + _WIDTH / 2, one["y"]
        x2, y2 = other["x"] + _WIDTH / 2, other["y"] + other["height"]
        middle = (y1 + y2) / 2
        return f"M{x1:.0f},{y1:.0f} C{x1:.0f},{middle:.0f} {x2:.0f},{middle:.0f} {x2:.0f},{y2:.0f}"
    x1, y1 = one["x"] + _WIDTH, one["y"] + one["height"] / 2
    x2, y2 = other["x"], other["y"] + other["height"] / 2
    middle = (x1 + x2) / 2
    return f"M{x1:.0f},{y1:.0f} C{middle:.0f},{y1:.0f} {middle:.0f},{y2:.0f} {x2:.0f},{y2:.0f}"
