"""What the embedded server needs of this machine: a free port, and the words in a log of mongod.

Always: nothing here starts, stops or waits for anything.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Final

HOST: Final = "127.0.0.1"


def last_words(log: Path, lines: int = 5) -> str:
    """The last errors of mongod's log, else its last lines, without the fields that only mongod reads."""
    entries: list[tuple[bool, str]] = []
    for line in log.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
            detail = json.dumps(entry["attr"]) if "attr" in entry else ""
            entries.append((entry["s"] in "EF", f"{entry['msg']} {detail}".strip()))
        except (ValueError, KeyError, TypeError):
            entries.append((True, line))
    chosen = [text for serious, text in entries if serious] or [text for _, text in entries]
    return "\n".join(text[:500] for text in chosen[-lines:]) or "nothing"


def is_free(port: int) -> bool:
    """Whether a server could listen at the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return _binds(probe, port)


def _binds(probe: socket.socket, port: int) -> bool:
    try:
        probe.bind((HOST, port))
    except OSError:
        return False
    return True


def free_port() -> int:
    """A port at which nobody listens now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
