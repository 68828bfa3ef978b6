"""Installs the lowest versions that pyproject.toml allows into a new environment, and tests the package there.

    python tests/packaging/lowest.py FOLDER [--only-install] [--newest NAME] [--pin torch==2.13.0]

Direct dependencies have exactly their lower bounds; what those need themselves is as new as they let it be.
`--pin` names another version of one of them, such as a build of torch that is at hand; it is installed first.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXTRAS = ("demo", "trust", "web")
TESTS = (
    "tests/test_component.py",
    "tests/test_query.py",
    "tests/test_signature.py",
    "tests/codecs",
    "tests/cli",
    "tests/train/test_loop.py",
    "tests/services/test_apply.py",
    "tests/schedule",
    "tests/data/test_collection.py",
)


def lower_bounds() -> dict[str, str]:
    """Name -> the lowest version allowed, of direct dependencies and of the extras that users install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(one for name in EXTRAS for one in project["optional-dependencies"][name]),
    ]
    found = {}
    for requirement in wanted:
        parts = re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement)
        if parts is None:
            raise ValueError(f"{requirement!r} has no lower bound, or more than that")
        found[parts[1]] = parts[2]
    return found


def main() -> None:
    """Install and test. Raises: CalledProcessError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only-install", action="store_true")
    parser.add_argument("--newest", nargs="*", default=[], metavar="NAME", help="dependencies that are not held")
    parser.add_argument(
        "--pin", nargs="*", default=[], metavar="NAME==VERSION", help="other versions than the lowest"
    )
    arguments = parser.parse_args()
    pinned = dict(one.split("==", 1) for one in arguments.pin)
    folder = arguments.folder.absolute()
    venv.create(folder, with_pip=True, clear=True)
    constraints = folder / "lowest.txt"
    lowest = {name: version for name, version in lower_bounds().items() if name not in arguments.newest}
    held = {**lowest, **pinned}
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in held.items()))
    extras = ",".join((*EXTRAS, "server"))
    pip = [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", "-c", constraints]
    if pinned:
        run([*pip, *arguments.pin])
    run([*pip, f"{ROOT}[{extras}]", "pytest", "pytest-timeout", "hypothesis", "time-machine"])
    run([folder / "bin" / "mongotorch", "--version"])
    if arguments.only_install:
        return
    run([folder / "bin" / "mongotorch", "demo", "--uri", "mongomock://lowest", "--steps", "50"])
    ignored = ["-W", "default", "-p", "no:cacheprovider"]  # a warning of an old release is not ours
    run([folder / "bin" / "python", "-m", "pytest", "-q", "-m", "not soak and not long", *ignored, *TESTS])


def run(command: list[str | Path]) -> None:
    """Run a command in the checkout, and show it."""
    sys.stdout.write(" ".join(map(str, command)) + "\n")
    sys.stdout.flush()
    subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
