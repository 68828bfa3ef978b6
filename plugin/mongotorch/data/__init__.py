"""Documents to batches: which documents are read, in which order, and how they become tensors.

It knows MongoDB and torch, and nothing of components, training or jobs.
"""

from mongotorch.data.check import DataCheck, FieldCheck, check_documents
from mongotorch.data.explain import Explanation, explain
from mongotorch.data.read import RunDtypes, assign_folds, check_select, fold_of
from mongotorch.data.stream.cache import working_folder
from mongotorch.data.stream.epochs import Report
from mongotorch.data.stream.spec import StreamSpec
from mongotorch.data.stream.stream import Stream
from mongotorch.data.training_set import (
    MOST_MEMBERS,
    BackgroundScan,
    Delta,
    Difference,
    Hashes,
    Members,
    ScannedMembers,
    StoredMembers,
    can_scan_at,
    id_key,
    is_large,
    scan_members,
    unseen,
)

__all__ = [
    "MOST_MEMBERS",
    "BackgroundScan",
    "DataCheck",
    "Delta",
    "Difference",
    "Explanation",
    "FieldCheck",
    "Hashes",
    "Members",
    "Report",
    "RunDtypes",
    "ScannedMembers",
    "StoredMembers",
    "Stream",
    "StreamSpec",
    "assign_folds",
    "can_scan_at",
    "check_documents",
    "check_select",
    "explain",
    "fold_of",
    "id_key",
    "is_large",
    "scan_members",
    "unseen",
    "working_folder",
]
