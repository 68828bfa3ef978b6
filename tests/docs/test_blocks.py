"""Every Python block of README.md and docs/ runs, page by page, as the script that a reader would make of it.

The blocks of a page share one `__main__`, one empty working folder and one fresh database, which
`MONGOTORCH_URI` names. Three comments change that, all invisible to the reader:

    <!-- test: mongod -->                 the page needs the real server
    <!-- test: prelude ... -->            Python that runs before the first block
    <!-- test: raises NAME -->            the next block ends in this error
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pymongo
import pytest

from mongotorch import errors

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- test: raises (?P<error>\w+) -->\n+)?```python\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE
)
PRELUDE = re.compile(r"<!-- test: prelude\n(?P<code>.*?)-->", re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|mailto:|#)(?P<target>[^)#\s]+)(?:#[^)]*)?\)")
ANCHOR = re.compile(r"\]\((?!https?://)(?P<target>[^)#\s]*)#(?P<anchor>[^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _has_blocks(path: Path) -> bool:
    return BLOCK.search(path.read_text(encoding="utf-8")) is not None


def _run(match: re.Match[str], page: Path, namespace: dict[str, object]) -> None:
    # Empty lines before the code, so that a traceback names the line of the page.
    above = match.string.count("\n", 0, match.start("code"))
    exec(compile("\n" * above + match["code"], str(page), "exec"), namespace)


@pytest.fixture
def address(page: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """The fresh database of a page: in memory, or on the real server where the page asks for it; dropped after."""
    name = f"docs_{uuid4().hex}"
    if "<!-- test: mongod -->" not in page.read_text(encoding="utf-8"):
        yield f"mongomock://{name}"
        return
    yield (uri := f"mongodb://{request.getfixturevalue('mongod')}/{name}?replicaSet=rs0")
    with pymongo.MongoClient[dict[str, Any]](uri) as client:
        client.drop_database(name)


@pytest.mark.parametrize("page", [page for page in PAGES if _has_blocks(page)], ids=_name)
def test_python_blocks_of_a_page_run_in_order(
    page: Path, address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = page.read_text(encoding="utf-8")
    monkeypatch.setenv("MONGOTORCH_URI", address)
    monkeypatch.setenv("MONGOTORCH_PROGRESS", "false")
    monkeypatch.chdir(tmp_path)
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    for prelude in PRELUDE.finditer(text):
        _run(prelude, page, vars(main))
    for block in BLOCK.finditer(text):
        if block["error"] is None:
            _run(block, page, vars(main))
            continue
        with pytest.raises(getattr(errors, block["error"])):
            _run(block, page, vars(main))


def test_links_lead_somewhere() -> None:
    links = [(page, link["target"]) for page in PAGES for link in LINK.finditer(page.read_text(encoding="utf-8"))]
    assert [f"{_name(page)}: {to}" for page, to in links if not (page.parent / to).exists()] == []


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = HEADING.findall(FENCED.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_anchors_lead_to_headings() -> None:
    lost = [
        f"{_name(page)}: {link['target']}#{link['anchor']}"
        for page in PAGES
        for link in ANCHOR.finditer(page.read_text(encoding="utf-8"))
        if link["anchor"] not in _anchors(page.parent / link["target"] if link["target"] else page)
    ]
    assert lost == []


def test_the_files_that_the_architecture_names_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    package, data = ROOT / "plugin" / "mongotorch", ROOT / "plugin" / "mongotorch" / "data"
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", text))
    assert [name for name in sorted(named) if not any((at / name).exists() for at in (ROOT, package, data))] == []


def test_every_page_can_be_reached_from_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    reached: set[Path] = set()
    ahead = [index]
    while ahead:
        page = ahead.pop()
        if page in reached:
            continue
        reached.add(page)
        links = LINK.finditer(page.read_text(encoding="utf-8"))
        ahead += [p for p in ((page.parent / link["target"]).resolve() for link in links) if p.suffix == ".md"]
    assert {page for page in PAGES if page.is_relative_to(index.parent)} <= reached


def test_the_index_of_the_decisions_has_each_of_them_under_its_title() -> None:
    folder = ROOT / "docs" / "decisions"
    rows = re.findall(
        r"^\| (\d+) \| \[(.+)\]\((.+)\) \|$", (folder / "README.md").read_text("utf-8"), re.MULTILINE
    )
    titles = {path.name: path.read_text("utf-8").splitlines()[0] for path in sorted(folder.glob("0*.md"))}
    assert [(name, f"# {number}. {title}") for number, title, name in rows] == list(titles.items())
