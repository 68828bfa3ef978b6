"""A newcomer's hour: the README from top to bottom in a new folder, a CSV file of one's own, and the examples.

`git clone` is the checkout itself, copied; `pip install` and `make demo` are the environment of the tests, since
installing torch again takes longer than all other tests together. Every other command runs as it is written.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.docs.pages import BLOCK, ROOT, text_of

README = ROOT / "README.md"
SHELL = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)
PYTHON = Path(sys.executable)
# Written as they are, and done already; each has to be in the README.
DONE = {
    "git clone https://github.com/mongotorch/mongotorch": "the copy",
    "cd mongotorch": "each command runs in it",
    "make demo": "`mongotorch demo`, below",
    "source .venv/bin/activate": "the PATH, below",
    "pip install .": "the environment",
    "pip install '.[server]'": "the environment",
    "pip install '.[demo]'": "the environment",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a newcomer has after cloning: what git tracks, and nothing else."""
    folder = tmp_path_factory.mktemp("hour") / "mongotorch"
    for name in ("plugin", "examples", "docs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """No setting of mongotorch, and the command on PATH, as after `source .venv/bin/activate`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MONGOTORCH_")}
    return {**kept, "PATH": f"{PYTHON.parent}{os.pathsep}{kept['PATH']}", "MONGOTORCH_PROGRESS": "false"}


def _commands() -> Iterator[str]:
    for block in SHELL.findall(text_of(README)):
        for line in block.splitlines():
            yield line.partition("  #")[0].strip()


def _write_flowers(path: Path) -> None:
    """A CSV file as people have them: a header, text, numbers, and a column that is of no use."""
    from sklearn.datasets import load_iris

    iris = load_iris()
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["sepal_length", "sepal_width", "petal_length", "petal_width", "note", "species"])
        for size, species in zip(iris.data.tolist(), iris.target, strict=True):
            rows.writerow([*size, "", str(iris.target_names[species])])


def _run(command: str, folder: Path, environment: dict[str, str]) -> str:
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


@pytest.mark.timeout(2400)
def test_every_command_of_the_readme_works_as_written_from_an_empty_folder(
    checkout: Path, environment: dict[str, str]
) -> None:
    commands = list(_commands())
    assert set(commands) >= set(DONE)
    printed = {"demo": _run("mongotorch demo --steps 100", checkout, environment)}
    assert "database: embedded server" in printed["demo"] or "embedded" in printed["demo"]

    script = "\n".join(block["code"] for block in BLOCK.finditer(text_of(README)))
    (checkout / "readme.py").write_text(script)
    _run("python readme.py", checkout, environment)

    _write_flowers(checkout / "flowers.csv")
    for command in commands:
        if command not in DONE:
            printed[command] = _run(command, checkout, environment)

    trained = printed["python examples/from_csv.py flowers.csv --target species"]
    assert "flowers: 150 documents" in trained
    assert "first row: setosa, predicted: setosa" in trained
    assert float(trained.partition("accuracy ")[2].split()[0]) > 0.8
    assert "flowers" in printed["mongotorch jobs"]
    assert "1" in printed["mongotorch show model flowers"]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_an_example_runs_and_runs_again(
    name: str, checkout: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    arguments = ""
    if name == "from_csv.py":
        _write_flowers(tmp_path / "flowers.csv")
        arguments = "flowers.csv --target species --steps 100"
    for _ in range(2):
        assert _run(f"python {checkout / 'examples' / name} {arguments}", tmp_path, environment)


def test_the_list_of_examples_has_each_of_them() -> None:
    listed = re.findall(r"^\| \[(\w+\.py)\]", text_of(ROOT / "examples" / "README.md"), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))
