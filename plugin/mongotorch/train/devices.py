"""Chooses the device that a model trains, is measured or predicts on.

Guarantees: a device that is named and missing is an error, never silently another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mongotorch.errors import ParameterError


def pick_device(preferred: Sequence[str]) -> torch.device:
    """The first of these devices that is there.

    Args:
        preferred: Names such as `cuda`, `cuda:1`, `mps`, `cpu`.

    Raises:
        ParameterError: Torch knows no such name, or none of the devices is there.
    """
    names = [preferred] if isinstance(preferred, str) else list(preferred)
    for name in names:
        if _is_there(_device(name, "preferred_devices")):
            return torch.device(name)
    raise ParameterError(f"none of the devices {names} is there; add 'cpu'", field="preferred_devices")


def training_device(compute_kwargs: Mapping[str, Any] | None, preferred: Sequence[str]) -> torch.device:
    """The device that `compute_kwargs` names, else the first preferred one that is there.

    Raises:
        ParameterError: Torch knows no such name, or the device is not there.
    """
    name = (compute_kwargs or {}).get("device")
    if not name:
        return pick_device(preferred)
    device = _device(name, "compute_kwargs")
    if not _is_there(device):
        raise ParameterError(f"compute_kwargs: the device {name!r} is not there", field="compute_kwargs")
    return device


def _device(name: str, field: str) -> torch.device:
    try:
        return torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ParameterError(f"{name!r} is no device that torch knows", field=field) from error


def _is_there(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    if device.type == "mps":
        return torch.backends.mps.is_available()
    return device.type == "cpu"
