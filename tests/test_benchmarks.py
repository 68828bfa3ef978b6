"""The benchmarks run: a small one of each contender, written as tables elsewhere than into the pages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_a_small_run_measures_every_contender(tmp_path: Path) -> None:
    small = ["--docs", "3000", "--many", "0", "--rounds", "1", "--out", str(tmp_path)]
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.bench_stream", *small]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = json.loads((tmp_path / "benchmarks.json").read_text(encoding="utf-8"))["rows"]
    measured = {row["what"] for row in rows if row["value"]}
    assert {
        "drain, vectors, over the fastest raw drain by _id",
        "MLP epoch, vectors, 1 worker, over hand-sliced",
    } <= measured
