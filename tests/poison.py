"""Trainers whose objective does to its process what no code should do, importable by workers."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def good(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target)


def slow(output: Tensor, target: Tensor) -> Tensor:
    time.sleep(0.4)
    return good(output, target)


def exits_with_0(output: Tensor, target: Tensor) -> Tensor:
    os._exit(0)


def exits_with_7(output: Tensor, target: Tensor) -> Tensor:
    os._exit(7)


def calls_sys_exit(output: Tensor, target: Tensor) -> Tensor:
    sys.exit()


def calls_sys_exit_with_text(output: Tensor, target: Tensor) -> Tensor:
    sys.exit("mongodb://me:secret@host said no")


def interrupts(output: Tensor, target: Tensor) -> Tensor:
    raise KeyboardInterrupt


def kills_itself(output: Tensor, target: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    raise AssertionError


def crashes(output: Tensor, target: Tensor) -> Tensor:
    ctypes.string_at(0)
    raise AssertionError


def aborts(output: Tensor, target: Tensor) -> Tensor:
    os.abort()


def never_ends(output: Tensor, target: Tensor) -> Tensor:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        try:
            time.sleep(1)
        except BaseException:  # noqa: BLE001 - it ignores whatever wants to end it
            continue


def holds_the_interpreter(output: Tensor, target: Tensor) -> Tensor:
    while True:
        ctypes.PyDLL(None).sleep(600)  # a call into C that does not release the GIL: no thread of the process runs


def stops_itself(output: Tensor, target: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGSTOP)
    return good(output, target)


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def raises_what_has_no_text(output: Tensor, target: Tensor) -> Tensor:
    raise MuteError


def recurses(output: Tensor, target: Tensor) -> Tensor:
    return recurses(output, target)


def closes_all_files(output: Tensor, target: Tensor) -> Tensor:
    os.closerange(0, 4096)
    return good(output, target)


def leaves_a_process(output: Tensor, target: Tensor) -> Tensor:
    if os.fork() == 0:
        time.sleep(600)
        os._exit(0)
    os._exit(1)


def is_not_finite(output: Tensor, target: Tensor) -> Tensor:
    return output.sum() * torch.nan


POISON: dict[Callable[..., Any], str] = {
    exits_with_0: "exit code 0",
    exits_with_7: "exit code 7",
    calls_sys_exit: "sys.exit",
    calls_sys_exit_with_text: "sys.exit",
    interrupts: "KeyboardInterrupt",
    kills_itself: "SIGKILL",
    crashes: "SIGSEGV",
    aborts: "SIGABRT",
    never_ends: "max_runtime_s",
    holds_the_interpreter: "max_runtime_s",
    stops_itself: "max_runtime_s",
    raises_what_has_no_text: "no text",
    recurses: "RecursionError",
    closes_all_files: "",
    leaves_a_process: "exit code 1",
    is_not_finite: "NonFiniteLossError",
}
"""What each trainer's job must say."""
