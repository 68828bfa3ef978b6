"""Reads back what commands print in a pipe: tables under headings, and pairs of names and values."""

from __future__ import annotations

import re


def lines_of(text: str) -> list[list[str]]:
    """The lines of a table, the headings (which have no spaces) first, as cells."""
    heading, *rows = text.splitlines()
    starts = [found.start() for found in re.finditer(r"\S+", heading)]
    spans = list(zip(starts, [*starts[1:], None], strict=True))
    return [[line[start:end].strip() for start, end in spans] for line in [heading, *rows]]


def columns_of(text: str) -> dict[str, list[str]]:
    """The cells of a table by their heading."""
    return {heading: list(cells) for heading, *cells in zip(*lines_of(text), strict=True)}


def pairs_of(text: str) -> dict[str, str]:
    """The values of `print_pairs` by their name; of a value in several lines the first."""
    found = (re.match(r"  (\S.*?)\s{2,}(.*)$", line) for line in text.splitlines()[1:])
    return {match[1]: match[2] for match in found if match}
