"""`python -m mongotorch` is the command `mongotorch`."""

from __future__ import annotations

from mongotorch.cli import app

app()
