"""The law of the house, checked: who imports whom, and how large a file and a function may grow."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "plugin").rglob("*.py"))
MOST_LINES_IN_A_FILE = 600
MOST_LINES_IN_A_FUNCTION = 60  # of its body: neither the signature nor the docstring count
OPTIONAL_HEAVY = {"fiftyone", "ray", "sklearn", "torch", "torchmetrics"}
NEEDS_AN_EXTRA = {"mongotorch.demo"}  # own modules that import an optional heavy one at their top

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT / "plugin"))


def _functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def _body_lines(function: Function) -> int:
    body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    return 0 if not body else (body[-1].end_lineno or body[-1].lineno) - body[0].lineno + 1


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    return [name if name in NEEDS_AN_EXTRA else name.partition(".")[0] for name in names]


def test_the_layer_law_is_kept() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--config", ".importlinter", "--no-cache"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, mongotorch; sys.exit('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr or "`import mongotorch` imported torch"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_a_source_file_says_why_it_exists_and_stays_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "the first docstring of a file says why it exists"
    assert len(text.splitlines()) <= MOST_LINES_IN_A_FILE


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_functions_stay_small(path: Path) -> None:
    sizes = {f.name: _body_lines(f) for f in _functions(ast.parse(path.read_text(encoding="utf-8")))}
    assert {name: size for name, size in sizes.items() if size > MOST_LINES_IN_A_FUNCTION} == {}


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_only_optional_heavy_modules_are_imported_inside_functions(path: Path) -> None:
    functions = _functions(ast.parse(path.read_text(encoding="utf-8")))
    inside = {name for function in functions for node in ast.walk(function) for name in _imported(node)}
    assert inside <= OPTIONAL_HEAVY | (NEEDS_AN_EXTRA if path.parent.name == "cli" else set())
