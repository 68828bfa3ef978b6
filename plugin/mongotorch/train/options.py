"""What `loader_kwargs` and `compute_kwargs` may say, checked when a trainer is made.

Always: an option that is accepted here is used; one that nobody would read is refused.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from mongotorch.errors import LoaderOptionError, ParameterError

_DECIDED = {
    "dataset": "the select says what is read",
    "sampler": "the order comes from shuffle and seed",
    "batch_sampler": "batches come from batch_size, shuffle and drop_last",
    "collate_fn": "it is a parameter of the trainer itself",
    "generator": "the trainer's seed decides what is random",
}
LOADER_OPTIONS = frozenset(inspect.signature(DataLoader.__init__).parameters) - {"self", *_DECIDED}
COMPUTE_OPTIONS = frozenset({"device", "num_workers"})


def check_loader(options: Mapping[str, Any], *, workers: int | None = None) -> None:
    """Refuse options that a DataLoader does not have or refuses.

    Args:
        options: `loader_kwargs`.
        workers: `num_workers` from elsewhere, for options that need some.

    Raises:
        LoaderOptionError: `field` names the option, where it is one alone.
    """
    for name in options:
        if name not in LOADER_OPTIONS:
            reason = _DECIDED.get(name, f"known are {', '.join(sorted(LOADER_OPTIONS))}")
            raise LoaderOptionError(f"loader_kwargs: {name!r} cannot be given: {reason}", field=name)
    size = options.get("batch_size", 1)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise LoaderOptionError(f"loader_kwargs: batch_size={size!r} must be 1 or more", field="batch_size")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on the number of workers is for when they run
            DataLoader(TensorDataset(torch.zeros(1)), **{"num_workers": workers or 0, **options})
    except (TypeError, ValueError, AssertionError) as error:
        raise LoaderOptionError(f"loader_kwargs: {error}", field="loader_kwargs") from error


def check_compute(options: Mapping[str, Any]) -> None:
    """Refuse options that no compute engine reads. Raises: ParameterError."""
    unknown = sorted(set(options) - COMPUTE_OPTIONS)
    if unknown:
        known = ", ".join(sorted(COMPUTE_OPTIONS))
        raise ParameterError(f"compute_kwargs: {unknown} are not known; known are {known}", field="compute_kwargs")
    workers = options.get("num_workers", 0)
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise ParameterError(f"compute_kwargs: num_workers={workers!r} must be 0 or more", field="compute_kwargs")
    device = options.get("device", "cpu")
    if not isinstance(device, str):
        raise ParameterError(f"compute_kwargs: device={device!r} must be a name", field="compute_kwargs")
