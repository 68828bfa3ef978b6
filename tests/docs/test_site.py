"""The site builds without a warning; each public name is two clicks from the start, and found by the search."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.docs.pages import DOCS, ROOT
from tests.docs.test_docstrings import reference


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    program = Path(sys.executable).with_name("mkdocs")
    command = [str(program), "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "WARNING" not in ran.stderr
    return folder


def _anchors() -> dict[str, str]:
    """Public name -> page and anchor, as the index of the reference links to them."""
    index = (DOCS / "reference" / "index.md").read_text("utf-8")
    found = re.findall(r"^\| \[`(\w+)`\]\(([\w.#]+)\) \| .+ \|$", index, re.MULTILINE)
    return {name: target.replace(".md#", "/#") for name, target in found}


def test_the_index_of_the_reference_has_each_public_name_and_the_start_has_the_index() -> None:
    assert set(_anchors()) == {name for names in reference.shown().values() for name in names}
    assert "(reference/index.md)" in (DOCS / "index.md").read_text("utf-8")


def test_each_link_of_the_index_of_the_reference_leads_to_an_anchor(site: Path) -> None:
    lost = []
    for target in _anchors().values():
        page, _, anchor = target.partition("#")
        if f'id="{anchor}"' not in (site / "reference" / page / "index.html").read_text("utf-8"):
            lost.append(target)
    assert lost == []


def test_search_finds_each_public_name_and_its_members(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text("utf-8"))
    places = {entry["location"] for entry in index["docs"]}
    assert [target for target in _anchors().values() if f"reference/{target}" not in places] == []
    assert "reference/datalayer/#mongotorch.Datalayer.apply" in places
    assert "reference/trainer/#mongotorch.TorchTrainer.take_step" in places


def test_links_and_pictures_of_the_site_are_there(site: Path) -> None:
    lost = []
    for page in site.rglob("*.html"):
        if page.name == "404.html":
            continue
        for target in re.findall(r'(?:href|src)="(?!https?:|mailto:|#|data:)([^"#?]*)', page.read_text("utf-8")):
            place = (page.parent / target).resolve()
            if not (place / "index.html").exists() and not place.is_file():
                lost.append(f"{page.relative_to(site)}: {target}")
    assert lost == []
