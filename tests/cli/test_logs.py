"""The log of a command: one format for all that a process has to say."""

from __future__ import annotations

import json
import subprocess
import sys

CODE = """
import logging, warnings
from mongotorch.cli.logs import logging_to_stderr
with logging_to_stderr("info", "json"):
    logging.getLogger("mongotorch.jobs").info("ours")
    try:
        raise OSError("mongodb://u:secret@h is gone")
    except OSError:
        logging.getLogger("pymongo.client").exception("MongoClient background task encountered an error:")
    warnings.warn("of torch")
    logging.getLogger("pymongo.command").info("not shown")
"""


def test_what_libraries_say_is_in_the_same_format_and_without_passwords() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["logger"] for line in lines] == ["mongotorch.jobs", "pymongo.client", "py.warnings"]
    assert "secret" not in done.stderr
    assert "is gone" in lines[1]["traceback"]
    assert "of torch" in lines[2]["message"]
