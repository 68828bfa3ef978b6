"""What MongoDB keeps: blobs by content, component documents by version, behind a connection by address."""

from __future__ import annotations

from mongotorch.store.artifacts import Artifacts
from mongotorch.store.components import Components
from mongotorch.store.connect import Connection, Opener, open_address, redact

__all__ = ["Artifacts", "Components", "Connection", "Opener", "open_address", "redact"]
