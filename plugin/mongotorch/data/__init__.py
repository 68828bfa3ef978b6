"""Documents to batches: columns, plan, order, prefetch, and the stream that puts them together.

Always: this room knows MongoDB and torch, and nothing of components, training or runs.
"""

from mongotorch.data.checks import check_select
from mongotorch.data.dataset import Stream
from mongotorch.data.explain import Explanation, explain
from mongotorch.data.folds import assign_folds, fold_of
from mongotorch.data.members import MOST_MEMBERS, Difference, Members
from mongotorch.data.membership import scan_members, unseen
from mongotorch.data.report import Report
from mongotorch.data.spec import LOADER_OPTIONS, StreamSpec, check_loader_options
from mongotorch.data.watermark import watermark
from mongotorch.key import Key
from mongotorch.query import FOLD_FIELD, FOLDS

__all__ = [
    "FOLDS",
    "FOLD_FIELD",
    "LOADER_OPTIONS",
    "MOST_MEMBERS",
    "Difference",
    "Explanation",
    "Key",
    "Members",
    "Report",
    "Stream",
    "StreamSpec",
    "assign_folds",
    "check_loader_options",
    "check_select",
    "explain",
    "fold_of",
    "scan_members",
    "unseen",
    "watermark",
]
