"""The rules of the package, checked: who imports whom, how large things may grow, which words names are made of.

A check lists its offenders, and the list has to be empty.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "plugin"
SOURCES = sorted(PLUGIN.rglob("*.py"))

MOST_LINES_IN_A_FILE = 600
FEWEST_LINES_IN_A_FILE = 60
MOST_LINES_IN_A_FUNCTION = 60  # of its body: neither the signature nor the docstring count
MOST_BRANCHES = 10  # the cyclomatic complexity of a function
MOST_MODULES_IN_A_FOLDER = 14
MOST_FLOORS_IN_A_FOLDER = 6  # the longest chain of imports among what lies in a folder; a sub-folder is one floor
MOST_ARROWS = {"mongotorch.data": 40, "mongotorch.services": 20}  # imports in all folders of that package

# A short file costs a reader a jump: each has to say what it is for. An `__init__.py` is the face of its folder.
SHORT_FILES = {
    "__main__.py": "Python asks for this name: `python -m mongotorch`",
    "_version.py": "the build reads the version from it without importing the package",
    "cli/dashboard.py": "one command, one file, as the other commands",
    "cli/doctor.py": "one command, over checks that live with the driver",
    "worker/preload.py": "what the process that others are forked from loads; it must not load anything else",
    "store/access_roles.py": "the roles that an administrator creates; nothing else needs them",
}

OPTIONAL_HEAVY = {"fiftyone", "matplotlib", "pandas", "ray", "sklearn", "torch", "torchmetrics"}
# Own modules that import an optional heavy one at their top.
NEEDS_AN_EXTRA = {"mongotorch.demo.digits", "mongotorch.web.server"}

# Words for which the field has a standard one, as parts of names (`_` and capitals part them).
PRIVATE_WORDS = re.compile(
    r"ahead|blocks?|brought|checker|clockwork|course|demands?|employer|errands?|facts|feeds?|garbage|gauges?|heart|held"
    r"|keeper|ledger|marks|news|onward|patience|performer|pieces?|places?|points|reign|said|scribe|shift|slots?|sure"
    r"|tasks?|told|wanted|works?"
)
STANDARD_NAMES = {
    "codecs/pickles.py slot": "what Python calls it",
    "codecs/pickles.py slots": "what Python calls them",
    "store/maintenance.py GarbageCollector": "standard as a whole",
}
ASKS_FOR_CORES = re.compile(r"\b(?:cpu_count|process_cpu_count|sched_getaffinity)\b")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _name(path: Path) -> str:
    return str(path.relative_to(PLUGIN / "mongotorch"))


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def _expect_none(offenders: Iterable[str], why: str) -> None:
    found = sorted(offenders)
    assert found == [], "\n".join([f"{why}:", *found])


# Imports


def _module(path: Path) -> str:
    parts = path.relative_to(PLUGIN).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path): path for path in SOURCES}
FOLDERS = sorted(name for name, path in MODULES.items() if path.name == "__init__.py")


@cache
def _own_imports(module: str) -> frozenset[str]:
    found: set[str] = set()
    for node in ast.walk(_tree(MODULES[module])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module or "" for name in full}
    return frozenset(found & MODULES.keys() - {module})


def _in_folder(folder: str, module: str) -> str | None:
    """The file or sub-folder of a folder that a module is or lies in; None for its `__init__` and for the rest."""
    return module.removeprefix(f"{folder}.").partition(".")[0] if module.startswith(f"{folder}.") else None


def _siblings(folder: str) -> Mapping[str, set[str]]:
    """Who imports whom among what lies in a folder."""
    arrows: dict[str, set[str]] = defaultdict(set)
    for module in MODULES:
        if (source := _in_folder(folder, module)) is not None:
            targets = (_in_folder(folder, target) for target in _own_imports(module))
            arrows[source] |= {target for target in targets if target not in (None, source)}
    return arrows


def _longest_chain(arrows: Mapping[str, set[str]]) -> list[str]:
    @cache
    def below(node: str) -> list[str]:
        return [node, *max((below(target) for target in sorted(arrows[node])), key=len, default=[])]

    return max((below(node) for node in sorted(arrows)), key=len, default=[])


def test_the_layer_law_is_kept() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--config", ".importlinter", "--no-cache"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, mongotorch; sys.exit('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr or "`import mongotorch` imported torch"


def test_a_folder_has_few_modules() -> None:
    counts = Counter(_name(path.parent) for path in SOURCES if path.name != "__init__.py")
    large = [f"{folder} has {count}" for folder, count in counts.items() if count > MOST_MODULES_IN_A_FOLDER]
    _expect_none(large, f"more than {MOST_MODULES_IN_A_FOLDER} modules in a folder")


# The package itself is left out: its floors are the layers of .importlinter.
@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "mongotorch"])
def test_a_folder_has_few_floors(folder: str) -> None:
    chain = _longest_chain(_siblings(folder))
    assert len(chain) <= MOST_FLOORS_IN_A_FOLDER, " -> ".join(chain)


@pytest.mark.parametrize("package", MOST_ARROWS)
def test_a_package_has_few_arrows(package: str) -> None:
    """Who imports whom in each of its folders, a sub-folder as one, whatever file or face of it is meant."""
    folders = [folder for folder in FOLDERS if f"{folder}.".startswith(f"{package}.")]
    arrows = [
        f"{folder}: {source} -> {target}"
        for folder in folders
        for source, targets in sorted(_siblings(folder).items())
        for target in sorted(targets)
    ]
    shown = "\n".join(arrows)
    found = [package] if len(arrows) > MOST_ARROWS[package] else []
    _expect_none(found, f"{len(arrows)} arrows, {MOST_ARROWS[package]} may be\n{shown}\n")


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    return [name if name in NEEDS_AN_EXTRA else name.partition(".")[0] for name in names]


def test_only_optional_heavy_modules_are_imported_inside_functions() -> None:
    found = [
        f"{_name(path)} {name}"
        for path in SOURCES
        for function in _functions(path)
        for node in ast.walk(function)
        for name in _imported(node)
        # A command imports what it needs when it runs: `--version` and a typo are answered without torch.
        if name not in OPTIONAL_HEAVY and path.parent.name != "cli"
    ]
    _expect_none(found, "imports go to the top of the file")


# Sizes


def _functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(_tree(path)) if isinstance(node, Function))


def _body_lines(function: Function) -> int:
    body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    return 0 if not body else (body[-1].end_lineno or body[-1].lineno) - body[0].lineno + 1


def test_a_file_is_not_too_long() -> None:
    long = [f"{_name(path)} has {_lines(path)}" for path in SOURCES if _lines(path) > MOST_LINES_IN_A_FILE]
    _expect_none(long, f"more than {MOST_LINES_IN_A_FILE} lines")


def test_a_short_file_says_why_it_is_one() -> None:
    short = {_name(path) for path in SOURCES if _lines(path) < FEWEST_LINES_IN_A_FILE and path.stem != "__init__"}
    assert SHORT_FILES.keys() - short == set(), "not there, or no longer short"
    _expect_none(short - SHORT_FILES.keys(), "merge these, or say in SHORT_FILES why they are files")


def test_functions_stay_small() -> None:
    sizes = [(f"{_name(path)} {f.name}", _body_lines(f)) for path in SOURCES for f in _functions(path)]
    large = [f"{function} has {size}" for function, size in sizes if size > MOST_LINES_IN_A_FUNCTION]
    _expect_none(large, f"more than {MOST_LINES_IN_A_FUNCTION} lines of body")


def test_ruff_holds_the_complexity_of_every_function() -> None:
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    assert "C90" in ruff["select"]
    assert ruff["mccabe"]["max-complexity"] == MOST_BRANCHES
    assert ruff["per-file-ignores"].pop("examples/**") == ["D208", "T20"]  # scripts print
    assert [where for where in ruff["per-file-ignores"] if not where.startswith("tests/")] == []
    assert [_name(path) for path in SOURCES if "C901" in path.read_text(encoding="utf-8")] == []


# Words


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Module | ast.ClassDef | Function):
            yield getattr(node, "name", "itself"), ast.get_docstring(node) or ""


def _given_names(path: Path) -> Iterator[str]:
    """The names that a file gives to something; those that it only uses may be another library's."""
    yield path.parent.name if path.stem == "__init__" else path.stem
    for node in ast.walk(_tree(path)):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case (
                ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store())
            ):
                yield name
            case ast.alias(asname=str(name)) | ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
                yield name


def _words(name: str) -> list[str]:
    """The parts of a name: `_` and capitals separate them."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def test_a_source_file_says_what_it_does() -> None:
    silent = [_name(path) for path in SOURCES if not ast.get_docstring(_tree(path))]
    _expect_none(silent, "no docstring: its first sentence says what the file does")


def test_names_are_standard_words() -> None:
    found = {
        f"{_name(path)} {name}"
        for path in SOURCES
        for name in _given_names(path)
        if any(PRIVATE_WORDS.fullmatch(word) for word in _words(name))
    }
    assert STANDARD_NAMES.keys() - found == set(), "not there"
    _expect_none(found - STANDARD_NAMES.keys(), "private words, for which the field has a standard one")


def test_docstrings_guarantee_only_what_is_an_invariant() -> None:
    found = [f"{_name(path)} {of}" for path in SOURCES for of, text in _docstrings(path) if "Always:" in text]
    _expect_none(found, '"Always:" is "Guarantees:" where it is an invariant, and goes elsewhere')


def test_public_class_names_are_unique_in_the_package() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in SOURCES:
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(_name(path))
    twice = [f"{name} in {' and '.join(paths)}" for name, paths in places.items() if len(paths) > 1]
    _expect_none(twice, "several classes of one name")


def test_nothing_depends_on_the_number_of_cores() -> None:
    found = {_name(path) for path in SOURCES if ASKS_FOR_CORES.search(path.read_text(encoding="utf-8"))}
    _expect_none(found, "the code asks for the cores of the machine")
