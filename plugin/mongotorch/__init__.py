"""Train PyTorch models where the data lives: the public face, which grows with the rooms."""

from __future__ import annotations

from mongotorch._version import __version__

__all__ = ["__version__"]
