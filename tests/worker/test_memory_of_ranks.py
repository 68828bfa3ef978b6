"""What a rank that trains keeps of the memory that each step frees."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

STEPS = """
import ctypes
import resource
from mongotorch.resources import keep_freed_memory
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes, c.memset.argtypes = ctypes.c_void_p, [ctypes.c_void_p], [
    ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
if {keeps}:
    keep_freed_memory()
def step():
    held = [(c.malloc(size), size) for size in (2**22, 2**23, 2**24, 2**23, 2**22)]
    for memory, size in held:
        c.memset(memory, 1, size)
        c.free(memory)
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*, keeps: bool, **environment: str) -> int:
    """How many pages the system cleared in 20 steps of 40 MB."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", STEPS.format(keeps=keeps)]
    return int(subprocess.run(command, check=True, capture_output=True, env={**kept, **environment}).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="malloc of glibc")
def test_a_rank_has_no_memory_cleared_in_each_step() -> None:
    pages = 20 * 40 * 2**20 // 4096
    assert faults(keeps=False) > pages / 8
    assert faults(keeps=True) < pages / 50
    assert faults(keeps=True, MALLOC_TRIM_THRESHOLD_="131072") > pages / 8  # the environment is heeded
