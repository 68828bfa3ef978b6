"""What MongoDB keeps: blobs by content, component documents by version."""

from __future__ import annotations

from mongotorch.store.artifacts import Artifacts
from mongotorch.store.components import Components

__all__ = ["Artifacts", "Components"]
