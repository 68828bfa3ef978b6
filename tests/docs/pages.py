"""Runs the Python blocks of a page, as the script that a reader would make of it.

The blocks of a page share one `__main__` and one empty working folder; `MONGOTORCH_URI` names the database. Four
comments change that, all invisible to the reader:

    <!-- test: mongod -->                 the page needs the real server
    <!-- test: prelude ... -->            Python that runs before the first block
    <!-- test: raises NAME -->            the next block ends in this error
    <!-- test: output -->                 the next block is what the block before it prints

With `WRITE_OUTPUTS=1` in the environment, the outputs are written into the pages instead of compared.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from mongotorch import errors

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- test: raises (?P<error>\w+) -->\n+)?```python\n(?P<code>.*?)^```$"
    r"(?:\n+<!-- test: output -->\n```text\n(?P<output>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)
PRELUDE = re.compile(r"<!-- test: prelude\n(?P<code>.*?)-->", re.DOTALL)


def name_of(path: Path) -> str:
    """The path of a page, from the root of the repository."""
    return str(path.relative_to(ROOT))


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def has_blocks(path: Path) -> bool:
    return BLOCK.search(text_of(path)) is not None


def needs_server(path: Path) -> bool:
    return "<!-- test: mongod -->" in text_of(path)


def in_order() -> list[Path]:
    """The pages with blocks in the order of the site's navigation, the README first."""
    lines = (ROOT / "mkdocs.yml").read_text("utf-8")
    listed = [DOCS / found for found in re.findall(r"^ +- .*?([\w/-]+\.md)$", lines, re.MULTILINE)]
    return [page for page in (ROOT / "README.md", *listed) if has_blocks(page)]


def _run(match: re.Match[str], page: Path, namespace: dict[str, object]) -> str:
    """Run one block; returns what it prints."""
    # Empty lines before the code, so that a traceback names the line of the page.
    above = match.string.count("\n", 0, match.start("code"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * above + match["code"], str(page), "exec"), namespace)
    return printed.getvalue()


def run_page(page: Path, monkeypatch: pytest.MonkeyPatch, folder: Path, address: str) -> None:
    """Run all blocks of a page and compare what they print, in a folder and over a database."""
    text = text_of(page)
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("MONGOTORCH_URI", address)
    monkeypatch.setenv("MONGOTORCH_PROGRESS", "false")
    monkeypatch.chdir(folder)
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    for prelude in PRELUDE.finditer(text):
        _run(prelude, page, vars(main))
    wrong = list(_wrong_outputs(text, page, vars(main)))
    if os.environ.get("WRITE_OUTPUTS"):
        for shown, printed in wrong:
            text = text.replace(shown[0], shown[0][: -len(shown["output"]) - 3] + printed + "```", 1)
        page.write_text(text, encoding="utf-8")
        return
    assert [(shown["output"], printed) for shown, printed in wrong] == []


def _wrong_outputs(text: str, page: Path, namespace: dict[str, object]) -> Iterator[tuple[re.Match[str], str]]:
    for block in BLOCK.finditer(text):
        if block["error"] is not None:
            with pytest.raises(getattr(errors, block["error"])):
                _run(block, page, namespace)
            continue
        printed = _run(block, page, namespace)
        if block["output"] is not None and printed.rstrip() != block["output"].rstrip():
            yield block, printed.rstrip() + "\n"
