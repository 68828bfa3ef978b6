"""Changes the code at random places, one change at a time, and says which changes no test notices.

    python -m tests.mutation [--count 60] [--seed 1] [--only store] [--stage-s 600] [--jobs 1]
                             [--covered FILE] [--out FILE]

The changes are those of cosmic-ray: another comparison, a condition negated, a number one larger, a loop that is
left out. They are drawn evenly over the lines of store, data, train, the services, the triggers and the worker,
and tried in a copy of the tree. For each, the tests of the same name run first, then those of the same folder,
then those of the services, until one fails; a change that none notices has survived. Where tests do not end in
time, it is not decided: a test that hangs fails by its own timeout. `make mutation` runs it.

With the coverage of a run of all tests, each a context, the tests that enter a line are known, and only they run
after those of the same name:

    COVERAGE_FILE=FILE pytest -n 3 --cov=plugin/mongotorch --cov-context=test --cov-report= -m "not soak"
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import contextlib
import dataclasses
import difflib
import itertools
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import coverage
from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

ROOT = Path(__file__).parents[1]
PACKAGE = Path("plugin/mongotorch")
PARTS = ("store", "data", "train", "services", "schedule", "worker")
# What they change has no meaning when the program runs, or is what the type checker is for.
LEFT_OUT = ("core/NoOp", "core/RemoveDecorator", "core/ReplaceBinaryOperator_BitOr")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutation:
    """One change: the `occurrence`th place of an operator in a file."""

    path: Path
    operator: str
    occurrence: int
    line: int


def _runs(source: str) -> set[int]:
    """The lines of a file whose code runs: neither annotations of their own, nor docstrings, nor imports."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            for statement in body:
                lines |= set(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    return lines


def _places(path: Path) -> Iterator[Mutation]:
    source = (ROOT / path).read_text(encoding="utf-8")
    runs, tree = _runs(source), get_ast(source)
    for name in plugins.operator_names():
        kind = plugins.get_operator(name)
        if name.startswith(LEFT_OUT) or kind.arguments():
            continue
        operator = kind()
        positions = (place for node in ast_nodes(tree) for place in operator.mutation_positions(node))
        for occurrence, (start, _) in enumerate(positions):
            if start[0] in runs:
                yield Mutation(path=path, operator=name, occurrence=occurrence, line=start[0])


def drawn(count: int, seed: int, only: str) -> list[Mutation]:
    """So many changes, at most one a line: a line with many possible changes comes no more often."""
    by_line: dict[tuple[Path, int], list[Mutation]] = {}
    for part in PARTS:
        for path in sorted((ROOT / PACKAGE / part).rglob("*.py")):
            relative = path.relative_to(ROOT)
            if only in str(relative):
                for place in _places(relative):
                    by_line.setdefault((relative, place.line), []).append(place)
    choose = random.Random(seed)
    lines = choose.sample(sorted(by_line), len(by_line))
    chosen = (choose.choice(by_line[line]) for line in lines)
    return list(itertools.islice((mutation for mutation in chosen if _is_code(mutation)), count))


def _mutated(source: str, mutation: Mutation) -> str:
    made = mutate_code(source, plugins.get_operator(mutation.operator)(), mutation.occurrence)
    assert made is not None
    return str(made)


def _is_code(mutation: Mutation) -> bool:
    """Whether a change leaves Python: `{**a}` with another operator is none."""
    try:
        compile(_mutated((ROOT / mutation.path).read_text(encoding="utf-8"), mutation), "", "exec")
    except SyntaxError:
        return False
    return True


@final
class Covering:
    """The tests that enter a line, by what was recorded of a run of tests that were a context each.

    Args:
        data: The file of coverage; None where nothing is known.
    """

    def __init__(self, data: Path | None) -> None:
        self._data = coverage.CoverageData(str(data)) if data is not None else None
        if self._data is not None:
            self._data.read()
        self._files = {} if self._data is None else {Path(name): name for name in self._data.measured_files()}

    def tests(self, path: Path, line: int) -> list[str]:
        """The tests of a line of a file, those of the folder of the same name first."""
        measured = [name for file, name in self._files.items() if file.parts[-len(path.parts) :] == path.parts]
        if self._data is None or not measured:
            return []
        contexts = self._data.contexts_by_lineno(measured[0]).get(line, ())
        tests = {name.rpartition("|")[0] for name in contexts if "|" in name}
        near = f"{_folder(path)}/"
        return sorted(tests, key=lambda test: (not test.startswith(near), test))


def _folder(path: Path) -> Path:
    """The folder of the tests of a file."""
    folder = Path("tests") / path.relative_to(PACKAGE).parent
    while not (ROOT / folder).is_dir():
        folder = folder.parent
    return folder


def _stages(mutation: Mutation, covering: Covering) -> list[list[str]]:
    """The tests to run, nearest first."""
    folder = _folder(mutation.path)
    own = sorted(str(each.relative_to(ROOT)) for each in (ROOT / folder).glob(f"test_{mutation.path.stem}*.py"))
    known = covering.tests(mutation.path, mutation.line)
    others = [known] if known else [[str(folder)], ["tests/services", "tests/test_files_entered.py"]]
    stages = [own, *others]
    return [stage for number, stage in enumerate(stages) if stage and stage not in stages[:number]]


def _fails(tree: Path, stage: list[str], limit_s: float) -> bool | None:
    """Whether a test fails; None where they do not end in time."""
    names = tree / "stage.txt"  # too many for a command line
    names.write_text("\n".join(stage), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tree / "plugin"), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not soak and not long"]
    process = subprocess.Popen(  # a group of its own: a change can leave processes behind
        [*command, "--timeout", "120", f"@{names}"],
        cwd=tree,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(limit_s) not in (0, 5)  # 5: there is no such test
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def tried(tree: Path, mutation: Mutation, covering: Covering, stage_s: float) -> dict[str, Any]:
    """Apply a change, run tests until one fails, and take it back."""
    file, begun = tree / mutation.path, time.monotonic()
    before = file.read_text(encoding="utf-8")
    after = _mutated(before, mutation)
    changed = [
        line
        for line in difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
        if line[0] in "+-" and line[:3] not in ("+++", "---")
    ]
    fate, by = "SURVIVED", None
    file.write_text(after, encoding="utf-8")
    try:
        for stage in _stages(mutation, covering):
            fails = _fails(tree, stage, stage_s)
            if fails is not False:
                fate, by = ("noticed" if fails else "undecided"), stage[:20]
                break
    finally:
        file.write_text(before, encoding="utf-8")
    where = {"file": str(mutation.path), "line": mutation.line, "operator": mutation.operator}
    return {**where, "diff": changed, "fate": fate, "by": by, "s": round(time.monotonic() - begun, 1)}


def _copied(folder: Path) -> Path:
    tree = folder / "tree"
    kept_out = shutil.ignore_patterns(".git", ".venv", ".mongotorch", "*_cache", "__pycache__", ".hypothesis")
    shutil.copytree(ROOT, tree, ignore=kept_out)
    return tree


def main() -> None:
    """Draw, try, print a line for each change, and the share that was noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="a part of the path of the files that are changed")
    parser.add_argument("--stage-s", type=float, default=600, help="the longest time of the tests of a stage")
    parser.add_argument("--jobs", type=int, default=1, help="how many changes are tried at a time")
    parser.add_argument("--covered", type=Path, help="the coverage of a run of tests that were a context each")
    parser.add_argument("--out", type=Path, help="a file for one JSON object a change")
    given = parser.parse_args()
    fates: Counter[str] = Counter()
    covering = Covering(given.covered)
    with (
        tempfile.TemporaryDirectory(prefix="mutation-") as folder,
        concurrent.futures.ThreadPoolExecutor(given.jobs) as executor,
    ):
        free = queue.SimpleQueue[Path]()
        for number in range(given.jobs):
            free.put(_copied(Path(folder) / str(number)))

        def attempt(mutation: Mutation) -> dict[str, Any]:
            tree = free.get()
            try:
                return tried(tree, mutation, covering, given.stage_s)
            finally:
                free.put(tree)

        for result in executor.map(attempt, drawn(given.count, given.seed, given.only)):
            fates[result["fate"]] += 1
            where = f"{result['file']}:{result['line']}"
            print(f"{result['fate']:9} {where} {result['s']} s {' | '.join(result['diff'])}", flush=True)
            if given.out is not None:
                with given.out.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(result) + "\n")
    print(f"{fates['noticed']} of {fates.total()} changes were noticed, {fates['undecided']} are not decided")


if __name__ == "__main__":
    main()
