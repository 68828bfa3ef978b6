"""A fixture for tools that come with the environment."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def run_tool() -> Callable[..., None]:
    """Run a tool of this environment; it has to succeed."""

    def run(tool: str, *arguments: str) -> None:
        program = str(Path(sys.executable).with_name(tool))
        ran = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr

    return run
