"""Ten pages that stay open while a run trains: how long they take, what the server holds, what the database scans.

A tab does what `dashboard.js` does: it listens to events, and loads its page and curves again a second later.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import COLLECTION
from tests.web.pages import fill_with_runs, insert_runs

from mongotorch import Datalayer

PAUSE_S = 1.0  # of dashboard.js, between two looks
GENEROUS_S = 3.0  # for a page that takes a tenth of it on a machine of its own
MOST_GROWN = 24 * 2**20  # bytes; a server that keeps what it has shown grows by hundreds of them


@contextmanager
def dashboard(uri: str) -> Iterator[tuple[str, int]]:
    """The dashboard in a process of its own: its address and its process."""
    command = [sys.executable, "-m", "mongotorch", "dashboard", "--port", "0", "--uri", uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().rpartition(": ")[2].strip(), process.pid
        finally:
            process.terminate()


def resident_bytes(pid: int) -> int:
    """What a process holds in memory."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Tab(threading.Thread):
    """One open page; `took` has the seconds of each look at it."""

    def __init__(self, address: str, path: str) -> None:
        super().__init__(daemon=True)
        self.path = path
        self.took: list[float] = []
        self.error: Exception | None = None
        self._address, self._ended = address.rstrip("/"), threading.Event()

    def run(self) -> None:
        try:
            self._look()
        except Exception as error:  # noqa: BLE001 - the test shows it
            self.error = None if self._ended.is_set() else error

    def end(self) -> None:
        self._ended.set()

    def _look(self) -> None:
        topics = self._load()
        with urllib.request.urlopen(f"{self._address}/events", timeout=60) as events:
            while (line := events.readline()) and not self._ended.is_set():
                if line.startswith(b"data: ") and topics & set(json.loads(line[6:])):
                    self._load()
                    self._ended.wait(PAUSE_S)

    def _load(self) -> set[str]:
        page = self.get(self.path)
        for curves in re.findall(r'data-charts="([^"]+)"', page):
            self.get(unescape(curves))
        found = re.search(r'data-topics="([^"]*)"', page)
        assert found is not None
        return set(found[1].split())

    def get(self, path: str) -> str:
        """What the server answers."""
        begun = time.perf_counter()
        with urllib.request.urlopen(self._address + path, timeout=60) as answer:
            text: str = answer.read().decode()
        self.took.append(time.perf_counter() - begun)
        return text


def median_s(address: str, path: str, times: int) -> float:
    """The median of the seconds that a page takes, asked for one time after the other."""
    tab = Tab(address, path)
    for _ in range(times):
        tab.get(path)
    return statistics.median(tab.took)


def train_for(db: Datalayer, job: str, seconds: float, step: int, tabs: list[Tab]) -> int:
    """Write what a run writes each second; the step that it has come to."""
    database = db[COLLECTION].raw.database
    until = time.monotonic() + seconds
    while time.monotonic() < until and not any(tab.error for tab in tabs):
        step += 1
        entry = {
            "job": job,
            "step": step,
            "kind": "train",
            "values": {"objective": 1 / step, "learning_rate": 0.1},
        }
        now = db.overview.runs(limit=1)["now"]
        database["mt.metrics"].insert_one({"_id": f"{job}:{step}:train", "format": 2, **entry, "at": now})
        database["mt.jobs"].update_one({"_id": job}, {"$set": {"progress.step": step}})
        time.sleep(1.0)
    return step


def scans(database: Any) -> list[dict[str, Any]]:
    """The profiled queries that read a whole collection; of the change stream, the oplog has no index."""
    found = database["system.profile"].find({"planSummary": "COLLSCAN"})
    return [
        one
        for one in found
        if "$changeStream" not in str(one.get("command")) + str(one.get("originatingCommand"))
        and "$collStats" not in str(one.get("command"))
        and "system.profile" not in one["ns"]
    ]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("seconds", "points"), [(30, 50), pytest.param(300, 1000, marks=pytest.mark.soak)], ids=["short", "whole"]
)
def test_ten_open_tabs_cost_little(server_uri: str, seconds: int, points: int) -> None:
    with Datalayer.connect(server_uri, valid_fraction=0.2, progress=False) as db:
        job, model = fill_with_runs(db)
        db.predict("model", "m", select=db[COLLECTION].find(), into="guess")
        runs = insert_runs(db, 1000, entries=points)
        database = db[COLLECTION].raw.database
        database["mt.jobs"].update_one({"_id": runs[-1]}, {"$set": {"status": "running"}})
        ten = "&run=".join(runs[-10:])
        paths = [
            "/",
            "/?limit=1000",
            "/?status=failed",
            f"/runs/{runs[-1]}",
            f"/runs/{job}",
            f"/compare?run={ten}",
        ]
        paths += ["/models", "/models/m", f"/lineage/{model.uuid}", "/schedules"]
        with dashboard(server_uri) as (address, pid):
            database.create_collection("system.profile", capped=True, size=256 * 2**20)
            alone = {path: median_s(address, path, 20) for path in paths}
            database.command("profile", 2)
            list(database["mt.jobs"].find({"worker": "nobody"}))  # which no index answers: it has to be noticed
            tabs = [Tab(address, path) for path in paths]
            for tab in tabs:
                tab.start()
            step = train_for(db, runs[-1], seconds / 5, points, tabs)
            early = resident_bytes(pid)
            train_for(db, runs[-1], seconds * 4 / 5, step, tabs)
            late = resident_bytes(pid)
            for tab in tabs:
                tab.end()
            database.command("profile", 0)
        scanned, profiled = scans(database), database["system.profile"].count_documents({})

    print(f"\n{profiled:,} profiled operations, {len(scanned) - 1} of the dashboard without an index")
    print(
        f"\nmemory of the server after {seconds / 5:.0f} s {early / 2**20:.1f} MiB, at the end {late / 2**20:.1f}"
    )
    for tab in tabs:
        median, most = statistics.median(tab.took), max(tab.took)
        print(
            f"{tab.path[:36]:36} alone {alone[tab.path] * 1e3:6.1f} ms; in a tab {len(tab.took):5} times, "
            f"median {median * 1e3:6.1f} ms, longest {most * 1e3:6.1f}"
        )
    assert [tab.error for tab in tabs if tab.error] == []
    assert [one["command"].get("filter") for one in scanned] == [{"worker": "nobody"}]
    assert late - early < MOST_GROWN
    for tab in tabs:
        assert statistics.median(tab.took) < GENEROUS_S, tab.path
    live = [tab for tab in tabs if "jobs" in tab.path or tab.path == "/" or "/runs/job" in tab.path]
    assert all(len(tab.took) > 3 for tab in live), "an open page was not loaded again"
