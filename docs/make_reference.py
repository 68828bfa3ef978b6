"""Writes the pages of docs/reference: which public names there are, and on which page each is.

What a name does is in its docstring, which mkdocstrings puts into the page when the site is built.

    python docs/make_reference.py            writes the pages
    python docs/make_reference.py --check    exit code 1 if a page is not what would be written

Guarantees: the pages depend on the code alone (no dates, no addresses of objects, no paths of this machine).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent / "reference"
# Public, but reached through their own module rather than through `mongotorch`.
MODULES = (
    "mongotorch.errors",
    "mongotorch.settings",
    "mongotorch.codecs",
    "mongotorch.jobs",
    "mongotorch.schedule",
    "mongotorch.testing",
)
# Group -> page -> what is on it: a name in `mongotorch`, or `module:name`; `module:*` is all that it offers.
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "For everybody": {
        "datalayer": ("Datalayer",),
        "collection": ("Collection", "Query"),
        "split": ("Split", "ByHash", "ByStoredFold", "ByTime", "ByGroup", "KFold"),
        "trainer": ("TorchTrainer", "Passed"),
        "model": ("TorchModel", "train:ModelSummary", "train:LayerSummary"),
        "metrics": ("Metric", "Validation", "Dataset"),
        "component": ("Component",),
        "jobs": ("Job", "jobs:RunMetrics", "jobs:MetricRow", "Worker"),
        "versions": (
            "Live",
            "Move",
            "services.lineage:Diff",
            "services.lineage:TrainedOn",
            "services.lineage:Reproduction",
            "services.versions.bundles:Bundle",
            "services.prediction:Predicted",
        ),
        "schedules": (
            "Schedule",
            "Cron",
            "Every",
            "NewDocuments",
            "Changed",
            "MetricBelow",
            "MetricAbove",
            "AnyOf",
            "AllOf",
            "Better",
            "Always",
            "Never",
            "schedule:preview",
            "Firing",
        ),
        "stream": ("data:Stream", "data:Report", "data:Explanation", "data:DataCheck", "data:FieldCheck"),
        "maintenance": ("store:Collected", "store:Verified"),
        "errors": ("errors:*",),
        "settings": ("Settings",),
    },
    "For extensions": {
        "codecs": ("codecs:Codec", "codecs:Codecs", "codecs:Pickled"),
        "triggers": ("Trigger", "State", "Decision"),
        "gates": ("Gate", "Scores", "Verdict"),
        "mirrors": ("mirrors:Mirror", "mirrors:MetricMirror", "mirrors:MirroredRun"),
        "engines": ("jobs:Engine", "jobs:LocalEngine", "jobs:QueueEngine"),
        "testing": ("testing:*",),
    },
}
TITLES = {
    "collection": "Collection and query",
    "split": "Splits",
    "metrics": "Metrics, validations, datasets",
    "jobs": "Jobs and workers",
    "versions": "Versions and lineage",
    "schedules": "Schedules, triggers and gates",
    "stream": "Streams and checks of data",
    "maintenance": "Maintenance reports",
    "triggers": "Triggers of one's own",
    "gates": "Gates of one's own",
    "testing": "Suites to inherit",
}
# Users get these from a datalayer: how they are built is not theirs.
HANDED_OUT = {"Collection", "Datalayer", "Job", "Live", "Stream"}
NOT_FOR_USERS = {  # for the dashboard, workers and mirrors
    *("Datalayer.overview", "Datalayer.runner", "Datalayer.scheduler", "Datalayer.run_log", "Datalayer.predictor"),
}
ENTRY = re.compile(r"    (\*{0,2}\w[\w., *]*?): (.*)")
NOTE = "<!-- Written by docs/make_reference.py; change the docstrings instead. -->\n"

INTRODUCTIONS = {"errors": inspect.cleandoc(importlib.import_module("mongotorch.errors").__doc__ or "") + "\n\n"}


def offered(module: Any) -> dict[str, Any]:
    """The classes and functions that a module offers: name -> object, sorted."""
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    found = {name: getattr(module, name) for name in sorted(names)}
    return {name: value for name, value in found.items() if documentable(value)}


def documentable(value: Any) -> bool:
    """Whether it is a class or a function of mongotorch."""
    own = (getattr(value, "__module__", None) or "").startswith("mongotorch.")
    return own and (inspect.isclass(value) or inspect.isfunction(value))


def entry(where: str) -> dict[str, Any]:
    """What an entry of `GROUPS` stands for: name -> object."""
    module_name, _, name = where.rpartition(":")
    module = importlib.import_module(f"mongotorch.{module_name}" if module_name else "mongotorch")
    return offered(module) if name == "*" else {name: getattr(module, name)}


@functools.cache
def shown() -> dict[str, dict[str, Any]]:
    """Page -> {name -> object}, in the order in which they are shown."""
    return {
        page: {name: value for where in entries for name, value in entry(where).items()}
        for pages in GROUPS.values()
        for page, entries in pages.items()
    }


def public() -> dict[str, Any]:
    """All that anybody may import: what is on a page, and what the public modules offer besides."""
    found = {name: value for page in shown().values() for name, value in page.items()}
    for module in map(importlib.import_module, ("mongotorch", *MODULES)):
        found |= offered(module)
    return dict(sorted(found.items()))


def shown_bases(cls: type) -> list[type]:
    """The base classes that have an entry of their own."""
    entries = [value for names in shown().values() for value in names.values()]
    return [base for base in cls.__mro__[1:] if base in entries]


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties of a class, without those that its shown bases already have."""
    seen: dict[str, Any] = {}
    for base in cls.__mro__:
        if base.__module__.startswith("mongotorch.") and base not in shown_bases(cls):
            for name, member in vars(base).items():
                seen.setdefault(name, member)
    for name, member in sorted(seen.items()):
        documented = isinstance(member, property | classmethod | staticmethod) or inspect.isfunction(member)
        if documented and not name.startswith("_"):
            yield name, member


def has_constructor(cls: type) -> bool:
    """Whether people make objects of it themselves, by arguments of its own."""
    if issubclass(cls, BaseException) or getattr(cls, "_is_protocol", False):
        return False
    return dataclasses.is_dataclass(cls) or "__init__" in vars(cls)


def describe(name: str, where: str, value: Any) -> str:
    """The directive by which mkdocstrings shows one public name."""
    options = {"merge_init_into_class": str(name not in HANDED_OUT).lower()}
    if inspect.isclass(value):
        found = [member for member, _ in members(value) if f"{name}.{member}" not in NOT_FOR_USERS]
        options |= {"inherited_members": "true", "members": f"[{', '.join(found)}]"}
        if issubclass(value, BaseException):
            options["members"] = "[]"
    lines = "".join(f"      {key}: {option}\n" for key, option in options.items())
    return f"::: {where}\n    options:\n{lines}"


def summary(value: Any) -> str:
    """The first sentence of a docstring."""
    text = (vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__) or ""
    return " ".join(inspect.cleandoc(text).partition("\n\n")[0].split())


def path_of(where: str, name: str) -> str:
    """The dotted path under which users import what an entry of `GROUPS` stands for."""
    module_name, _, _ = where.rpartition(":")
    return f"mongotorch.{module_name}.{name}" if module_name else f"mongotorch.{name}"


def pages() -> dict[str, str]:
    """File name -> what it holds."""
    written: dict[str, str] = {}
    listing: list[str] = []
    for group, entries in GROUPS.items():
        listing += [f"\n## {group}\n"]
        for page, wheres in entries.items():
            names = [(name, where, value) for where in wheres for name, value in entry(where).items()]
            text = f"{NOTE}\n# {TITLES.get(page, page.capitalize())}\n\n{INTRODUCTIONS.get(page, '')}"
            text += "\n".join(describe(name, path_of(where, name), value) for name, where, value in names)
            written[f"{page}.md"] = text
            listing += [f"\n### [{TITLES.get(page, page.capitalize())}]({page}.md)\n", "| | |", "|---|---|"]
            listing += [
                f"| [`{name}`]({page}.md#{path_of(where, name)}) | {summary(value).replace('|', chr(92) + '|')} |"
                for name, where, value in names
            ]
    head = (
        "# Reference\n\nAll public names. The commands are in [Work from the command line]"
        "(../how-to/command-line.md).\n"
    )
    return {"index.md": f"{NOTE}\n{head}" + "\n".join(listing) + "\n"} | written


def main() -> int:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a page is stale")
    check = parser.parse_args().check
    wanted = pages()
    there = {path.name: path.read_text(encoding="utf-8") for path in TARGET.glob("*.md")}
    stale = sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))
    if check:
        if stale:
            sys.stderr.write(f"stale in docs/reference: {', '.join(stale)}; run `make docs`\n")
        return 1 if stale else 0
    TARGET.mkdir(exist_ok=True)
    for name in there.keys() - wanted.keys():
        (TARGET / name).unlink()
    for name, text in wanted.items():
        (TARGET / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
