"""Writes docs/reference/ from the docstrings of what users and extensions meet, so that the two never differ.

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
from collections.abc import Callable, Iterator
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
    "For users": {
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
# Users get these from a datalayer: how they are built is not theirs.
HANDED_OUT = {"Collection", "Datalayer", "Job", "Live", "Stream"}
NOT_FOR_USERS = {  # for the dashboard, workers and mirrors
    *("Datalayer.overview", "Datalayer.runner", "Datalayer.scheduler", "Datalayer.run_log"),
}
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Source")
LISTS = ("Args", "Attributes", "Raises")
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


def show_default(value: Any) -> str:
    """A default as one would write it."""
    if isinstance(value, int) and value > 2**63 and str(value) == "1" + "0" * (len(str(value)) - 1):
        return f"10**{len(str(value)) - 1}"
    if isinstance(value, Path):
        return repr(str(value))
    if callable(value):
        return str(getattr(value, "__qualname__", type(value).__name__))
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def show_annotation(value: Any) -> str:
    """An annotation as it stands in the source, without the names of modules."""
    text = value if isinstance(value, str) else inspect.formatannotation(value)
    return re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", text)


def parameters(value: Callable[..., Any]) -> Iterator[str]:
    """The parameters of a callable as one would write them, `self` left out."""
    before = inspect.Parameter.POSITIONAL_ONLY
    for name, parameter in inspect.signature(value).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and before not in (
            parameter.KEYWORD_ONLY,
            parameter.VAR_POSITIONAL,
        ):
            yield "*"
        before = parameter.kind
        if name == "self":
            continue
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        typed = "" if parameter.annotation is parameter.empty else f": {show_annotation(parameter.annotation)}"
        default = "" if parameter.default is parameter.empty else f" = {show_default(parameter.default)}"
        yield f"{star}{name}{typed}{default}"


def signature(name: str, value: Callable[..., Any]) -> str:
    """A signature in a fenced block, one parameter a line where it gets long."""
    parts = list(parameters(value))
    given = inspect.signature(value).return_annotation
    back = "" if given is inspect.Signature.empty or inspect.isclass(value) else f" -> {show_annotation(given)}"
    line = f"{name}({', '.join(parts)}){back}"
    if len(line) > 96:
        line = f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){back}"
    return f"```text\n{line}\n```\n"


def prose(text: str) -> str:
    """A Google-style docstring as Markdown: sections in bold, entries as a list."""
    out: list[str] = []
    section = ""
    for line in inspect.cleandoc(text).splitlines():
        heading = re.fullmatch(rf"({'|'.join(SECTIONS)}):\s*(.*)", line)
        if heading:
            section = heading[1]
            out += [f"**{section}**", "", *([heading[2]] if heading[2] else [])]
        elif section in LISTS and (entry := ENTRY.fullmatch(line)):
            names = ", ".join(f"`{name.strip()}`" for name in entry[1].split(","))
            out.append(f"- {names}: {entry[2]}")
        elif section in LISTS and line.startswith("        "):
            out.append("  " + line.strip())
        else:
            section = section if not line or line.startswith(" ") else ""
            out.append(line.strip() if section else line)
    return "\n".join(out).strip() + "\n"


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


def describe_member(owner: str, name: str, member: Any) -> str:
    """One method or property."""
    function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    head = f"### `{owner}.{name}`\n\n"
    if isinstance(member, property):
        return head + prose(inspect.getdoc(function) or "")
    bound = getattr(importlib.import_module(function.__module__), owner, None)
    shown = getattr(bound, name) if isinstance(member, classmethod) and bound else function
    return head + signature(name, shown) + "\n" + prose(inspect.getdoc(function) or "")


def fields(settings: Any) -> str:
    """The fields of a settings class, in a fenced block."""
    lines = [
        f"{name}: {show_annotation(field.annotation)} = {show_default(field.default)}"
        for name, field in settings.model_fields.items()
    ]
    return "```text\n" + "\n".join(lines) + "\n```\n"


def describe(name: str, value: Any) -> str:
    """One public name."""
    parts = [f"## `{name}`\n"]
    own = (vars(value).get("__doc__") if inspect.isclass(value) else inspect.getdoc(value)) or ""
    if inspect.isclass(value) and shown_bases(value):
        parts.append(f"Is a `{shown_bases(value)[0].__name__}`.\n")
    if name in HANDED_OUT:
        own = re.sub(r"(?ms)^    Args:\n.*?(?=^    \w+:\n|\Z)", "", own)
    elif hasattr(value, "model_fields"):
        parts.append(fields(value))
    elif not inspect.isclass(value) or has_constructor(value):
        parts.append(signature(name, value))
    parts.append(prose(own))
    if inspect.isclass(value) and not issubclass(value, BaseException):
        found = [(member, at) for member, at in members(value) if f"{name}.{member}" not in NOT_FOR_USERS]
        parts += [describe_member(name, *member) for member in found]
    return "\n".join(parts)


def pages() -> dict[str, str]:
    """File name -> what it holds."""
    written = {
        f"{page}.md": f"{NOTE}\n# Reference: {page}\n\n{INTRODUCTIONS.get(page, '')}"
        + "\n".join(describe(name, value) for name, value in names.items())
        for page, names in shown().items()
    }
    listing = "".join(
        f"\n## {group}\n\n"
        + "".join(
            f"- [{page}]({page}.md): {', '.join(f'`{name}`' for name in shown()[page])}\n" for page in entries
        )
        for group, entries in GROUPS.items()
    )
    head = "# Reference\n\nThe commands are in [Work from the command line](../how-to/command-line.md).\n"
    return {"index.md": f"{NOTE}\n{head}{listing}"} | written


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
