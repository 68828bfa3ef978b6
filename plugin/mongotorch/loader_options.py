"""Checks the options that are passed on to a torch `DataLoader`, where a stream or a trainer is made.

Guarantees: an option that is accepted here is used; one that nobody would read is refused.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch.utils.data import DataLoader, TensorDataset

from mongotorch.errors import LoaderOptionError

_NAMES: Final = frozenset(inspect.signature(DataLoader.__init__).parameters) - {"self"}
_REFUSED: Final = {
    "dataset": "the select says what is read",
    "sampler": "the order comes from shuffle and seed",
    "batch_sampler": "batches come from batch_size, shuffle and drop_last",
}
_OWN_PARAMETER: Final = "it is a parameter of its own"
_REFUSED_BY_STREAMS: Final = _REFUSED | dict.fromkeys(
    ("collate_fn", "batch_size", "shuffle", "drop_last"), _OWN_PARAMETER
)
_REFUSED_BY_TRAINERS: Final = _REFUSED | {
    "collate_fn": _OWN_PARAMETER,
    "generator": "the trainer's seed decides what is random",
}


def check_stream_loader(options: Mapping[str, Any]) -> None:
    """Refuse options of a stream that a DataLoader does not have, or that mean nothing here.

    Raises:
        LoaderOptionError: `field` names the option.
    """
    _check_names(options, _REFUSED_BY_STREAMS, "loader option")
    _check_workers(options)


def check_trainer_loader(options: Mapping[str, Any], *, workers: int | None = None) -> None:
    """Refuse `loader_kwargs` that a DataLoader does not have or refuses.

    Args:
        options: `loader_kwargs`.
        workers: `num_workers` from elsewhere, for options that need some.

    Raises:
        LoaderOptionError: `field` names the option, where it is one alone.
    """
    _check_names(options, _REFUSED_BY_TRAINERS, "loader_kwargs:")
    _check_workers(options)
    size = options.get("batch_size", 1)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise LoaderOptionError(f"loader_kwargs: batch_size={size!r} must be 1 or more", field="batch_size")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on the number of workers is for when they run
            DataLoader(TensorDataset(torch.zeros(1)), **{"num_workers": workers or 0, **options})
    except (TypeError, ValueError, AssertionError) as error:
        raise LoaderOptionError(f"loader_kwargs: {error}", field="loader_kwargs") from error


def _check_names(options: Mapping[str, Any], refused: Mapping[str, str], where: str) -> None:
    for name in options:
        if name in refused or name not in _NAMES:
            reason = refused.get(name, f"known are {', '.join(sorted(_NAMES - refused.keys()))}")
            raise LoaderOptionError(f"{where} {name!r} cannot be given: {reason}", field=name)


_MOST_WORKERS: Final = 10_000


def _check_workers(options: Mapping[str, Any]) -> None:
    workers = options.get("num_workers", 0)
    if type(workers) is not int or not 0 <= workers <= _MOST_WORKERS:
        raise LoaderOptionError(
            f"num_workers={workers!r}: it must be a whole number from 0 to {_MOST_WORKERS}", field="num_workers"
        )
