"""The notebooks in examples/ run from top to bottom, and show tables rather than walls of text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))
# In a process of its own: a kernel leaves sockets behind.
RUN = """
import sys
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    done = tmp_path / "done.ipynb"
    ran = subprocess.run(
        [sys.executable, "-c", RUN, str(path), str(done)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    outputs = [one for cell in json.loads(done.read_text())["cells"] for one in cell.get("outputs", [])]
    plain = ["".join(one["data"]["text/plain"]) for one in outputs if one["output_type"] == "execute_result"]
    html = ["".join(one["data"].get("text/html", "")) for one in outputs if "data" in one]
    assert plain[0] == "<500 inserted: 0, 1, 2, ...>"
    assert max(map(len, plain)) < 3000
    assert sum("<table>" in one for one in html) >= 4
    assert any("<polyline" in one for one in html), "the curve of the job"
    assert any("step" in "".join(one.get("text", "")) for one in outputs), "the bar is shown without a setting"


def test_there_is_a_notebook() -> None:
    assert NOTEBOOKS
