"""Which device a model runs on, and how a batch gets there.

Always: a device that is not there is never chosen silently where it was named; what is no tensor stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mongotorch.errors import ParameterError


def pick_device(preferred: Sequence[str]) -> torch.device:
    """The first of these devices that is there.

    Args:
        preferred: Names such as `cuda`, `cuda:1`, `mps`, `cpu`.

    Raises:
        ParameterError: A name that is none, or none of them is there.
    """
    names = [preferred] if isinstance(preferred, str) else list(preferred)
    for name in names:
        if _is_there(named_device(name)):
            return torch.device(name)
    raise ParameterError(f"none of the devices {names} is there; add 'cpu'", field="preferred_devices")


def named_device(name: str, field: str = "preferred_devices") -> torch.device:
    """The device of a name. Raises: ParameterError when torch knows no such name."""
    try:
        return torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ParameterError(f"{name!r} is no device that torch knows", field=field) from error


def required_device(name: str) -> torch.device:
    """The device that was asked for by name. Raises: ParameterError when it is not there."""
    device = named_device(name, "compute_kwargs")
    if not _is_there(device):
        raise ParameterError(f"compute_kwargs: the device {name!r} is not there", field="compute_kwargs")
    return device


def _is_there(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    if device.type == "mps":
        return torch.backends.mps.is_available()
    return device.type == "cpu"
