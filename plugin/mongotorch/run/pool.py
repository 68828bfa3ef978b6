"""Several workers side by side, each a process of its own.

Always: a process is told to stop once, and waited for; one that dies is started again, unless all are told to
stop; nothing but the command and the environment crosses to them.
"""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from types import FrameType

_POLL_S = 0.2


def run_pool(command: Sequence[str], *, count: int, environment: Mapping[str, str], again: bool) -> int:
    """Run a command in several processes until SIGTERM or SIGINT comes, or all have ended by themselves.

    Args:
        command: What each process runs.
        count: How many.
        environment: Theirs; secrets go here, since arguments are for all to see.
        again: Start a process again that ends with an error.

    Returns:
        The exit code: 0, or that of the last process that ended with an error and was not started again.
    """
    stop = threading.Event()

    def handle(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        stop.set()

    def start() -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C goes to this process, which tells the others.
        return subprocess.Popen(list(command), env=dict(environment), start_new_session=True)  # noqa: S603

    before = {sign: signal.signal(sign, handle) for sign in (signal.SIGTERM, signal.SIGINT)}
    processes = [start() for _ in range(count)]
    code = 0
    try:
        while processes and not stop.wait(_POLL_S):
            for ended in [process for process in processes if process.poll() is not None]:
                processes.remove(ended)
                if ended.returncode and again:
                    processes.append(start())
                code = ended.returncode if not again else 0
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait()
        for sign, handler in before.items():
            signal.signal(sign, handler)
    return code
