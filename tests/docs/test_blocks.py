"""Every Python block of README.md and docs/ runs, page by page, each over a fresh database; links lead somewhere.

`pages.py` says how a page is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pymongo
import pytest
from tests.docs.pages import BLOCK, PAGES, ROOT, has_blocks, in_order, name_of, needs_server, run_page, text_of

LINK = re.compile(r"\]\((?!https?://|mailto:|#)(?P<target>[^)#\s]+)(?:#[^)]*)?\)")
ANCHOR = re.compile(r"\]\((?!https?://)(?P<target>[^)#\s]*)#(?P<anchor>[^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
GENERATED = "reference"  # its anchors are those of mkdocstrings; the build of the site checks them


@pytest.fixture
def address(page: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """The fresh database of a page: in memory, or on the real server where the page asks for it; dropped after."""
    name = f"docs_{uuid4().hex}"
    if not needs_server(page):
        yield f"mongomock://{name}"
        return
    yield (uri := f"mongodb://{request.getfixturevalue('mongod')}/{name}?replicaSet=rs0")
    with pymongo.MongoClient[dict[str, Any]](uri) as client:
        client.drop_database(name)


@pytest.mark.parametrize("page", [page for page in PAGES if has_blocks(page)], ids=name_of)
def test_python_blocks_of_a_page_run_in_order(
    page: Path, address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_page(page, monkeypatch, tmp_path, address)


def test_every_page_with_blocks_is_in_the_navigation() -> None:
    assert sorted(in_order()) == sorted(page for page in PAGES if has_blocks(page))


def test_a_job_of_the_cookbook_is_short() -> None:
    """At most 40 lines for each, without the documents that a page makes up, and what is done with the model."""
    for page in (ROOT / "docs" / "cookbook").glob("*.md"):
        jobs = [block["code"] for block in BLOCK.finditer(text_of(page)) if "db.apply(" in block["code"]]
        assert [sum(1 for line in job.splitlines() if line) <= 40 for job in jobs] == [True], name_of(page)


def test_links_lead_somewhere() -> None:
    links = [(page, link["target"]) for page in PAGES for link in LINK.finditer(text_of(page))]
    assert [f"{name_of(page)}: {to}" for page, to in links if not (page.parent / to).exists()] == []


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = HEADING.findall(FENCED.sub("", text_of(page)))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_anchors_lead_to_headings() -> None:
    lost = [
        f"{name_of(page)}: {link['target']}#{link['anchor']}"
        for page in PAGES
        for link in ANCHOR.finditer(text_of(page))
        if GENERATED not in link["target"].split("/") and page.parent.name != GENERATED
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
        links = LINK.finditer(text_of(page))
        ahead += [p for p in ((page.parent / link["target"]).resolve() for link in links) if p.suffix == ".md"]
    assert {page for page in PAGES if page.is_relative_to(index.parent)} <= reached


def test_the_index_of_the_decisions_has_each_of_them_under_its_title() -> None:
    folder = ROOT / "docs" / "decisions"
    rows = re.findall(
        r"^\| (\d+) \| \[(.+)\]\((.+)\) \|$", (folder / "README.md").read_text("utf-8"), re.MULTILINE
    )
    titles = {path.name: path.read_text("utf-8").splitlines()[0] for path in sorted(folder.glob("0*.md"))}
    assert [(name, f"# {number}. {title}") for number, title, name in rows] == list(titles.items())
