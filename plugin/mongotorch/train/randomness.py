"""The random number generators that training draws from, as one state.

Always: a run's draws depend on its seed alone, and the program that runs it finds its own generators as it left
them.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All generators seeded inside, and as they were afterwards."""
    before = capture()
    # numpy takes 32 bits only; torch takes 64.
    torch.manual_seed(seed % 2**63)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        restore(before)


def capture() -> dict[str, Any]:
    """The state of torch's (each CUDA device too), numpy's and Python's global generators."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, np.array(keys), int(position), int(has_gauss), float(cached)],
        "python": random.getstate(),
    }


def restore(state: Mapping[str, Any]) -> None:
    """Set all generators to a captured state; CUDA devices that are not here are left out."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(list(state["cuda"]))
    np.random.set_state(tuple(state["numpy"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
