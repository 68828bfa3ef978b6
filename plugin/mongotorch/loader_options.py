"""Options of a `DataLoader`: which there are, and which mean nothing here."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader

from mongotorch.errors import LoaderOptionError

# What the stream decides itself, and where it is said instead.
_REFUSED = {
    "dataset": "the select says what is read",
    "sampler": "the order comes from shuffle and seed",
    "batch_sampler": "batches come from batch_size, shuffle and drop_last",
    "collate_fn": "it is a parameter of its own",
    "batch_size": "it is a parameter of its own",
    "shuffle": "it is a parameter of its own",
    "drop_last": "it is a parameter of its own",
}
LOADER_OPTIONS = frozenset(inspect.signature(DataLoader.__init__).parameters) - {"self", *_REFUSED}


def check_loader_options(options: Mapping[str, Any]) -> None:
    """Refuse options that a DataLoader does not have, or that mean nothing here.

    Raises:
        LoaderOptionError: `field` names the option.
    """
    for name in options:
        if name not in LOADER_OPTIONS:
            reason = _REFUSED.get(name, f"known are {', '.join(sorted(LOADER_OPTIONS))}")
            raise LoaderOptionError(f"loader option {name!r} cannot be given: {reason}", field=name)
