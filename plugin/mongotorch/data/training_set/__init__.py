"""Which documents a run is trained on: sets of them, scanned before a run or while it trains."""

from mongotorch.data.training_set.background import BackgroundScan, PendingMembers, ScannedMembers, can_scan_at
from mongotorch.data.training_set.members import (
    MOST_MEMBERS,
    ContentDigest,
    Delta,
    Difference,
    Hashes,
    Members,
    StoredMembers,
    id_key,
    is_large,
    members_of,
    only,
    only_once,
    scan_members,
    unseen,
)

__all__ = [
    "MOST_MEMBERS",
    "BackgroundScan",
    "ContentDigest",
    "Delta",
    "Difference",
    "Hashes",
    "Members",
    "PendingMembers",
    "ScannedMembers",
    "StoredMembers",
    "can_scan_at",
    "id_key",
    "is_large",
    "members_of",
    "only",
    "only_once",
    "scan_members",
    "unseen",
]
