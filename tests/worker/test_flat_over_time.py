"""Workers, schedules and a served model over a long time, under step-downs: what processes hold does not grow.

The long one: `pytest -m soak -s tests/worker/test_flat_over_time.py`; it prints what each process held.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import COLLECTION, fill, model, trainer
from tests.worker.test_elections import ReplicaSet, retried

from mongotorch import Always, Changed, Datalayer, Every, MetricBelow, Schedule

pytestmark = [
    pytest.mark.fault,
    pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks Linux what processes hold"),
]
SERVED = "m-every"
TRIGGERS = {
    "every": Every(seconds=3.0),
    "changed": Changed(200),
    "below": MetricBelow("objective", 1000.0, every_s=5.0),
}
FOREIGN = """
    import sys, time, pymongo
    from pymongo.errors import PyMongoError
    documents = pymongo.MongoClient(sys.argv[1]).get_database()[sys.argv[2]]
    n = 1_000_000
    while True:
        try:
            documents.insert_many([{"_id": n + i, "x": [0.5 * i] * 4, "y": i % 3, "n": i} for i in range(5)])
            documents.delete_many({"_id": {"$lt": n - 2_000, "$gte": 1_000_000}})
        except PyMongoError:
            pass  # an election
        n += 5
        time.sleep(0.1)
"""
FOLLOWER = """
    import sys, threading, time, torch, mongotorch
    torch.set_num_threads(1)
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set())).start()
    while True:
        try:
            db = mongotorch.Datalayer.connect(sys.argv[1])
            live = db.live("model", sys.argv[2])
            break
        except mongotorch.MongotorchError:
            time.sleep(1)
    seen, predicted = set(), 0
    while not ended.wait(0.05):
        assert live.predict(torch.zeros(4)).shape == (3,)
        seen.add(live.version)
        predicted += 1
    print(len(seen), predicted, flush=True)
    live.close()
    db.close()
"""


@dataclasses.dataclass(frozen=True)
class Held:
    """What a process holds: bytes in memory, threads, open files and connections."""

    nbytes: int
    threads: int
    descriptors: int

    @classmethod
    def by(cls, pid: int) -> Held:
        status = Path(f"/proc/{pid}/status").read_text()
        found = {name: re.search(rf"{name}:\s+(\d+)", status) for name in ("VmRSS", "Threads")}
        sizes = {name: 0 if match is None else int(match[1]) for name, match in found.items()}
        return cls(sizes["VmRSS"] * 1024, sizes["Threads"], len(list(Path(f"/proc/{pid}/fd").iterdir())))


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            children[int(path.read_text().rpartition(")")[2].split()[1])].append(int(path.parent.name))
    found = [pid]
    for each in found:
        found += children[each]
    return found


def grown(samples: list[Held], allowed: Held) -> list[str]:
    """What a process holds more of in the last third of its samples than in the one before, in words."""
    third = len(samples) // 3
    middle, last = samples[third : 2 * third], samples[2 * third :]
    found = []
    for name, more in dataclasses.asdict(allowed).items():
        before, after = (statistics.median(getattr(one, name) for one in part) for part in (middle, last))
        if after > before + more:
            found.append(f"{name}: {before:,.0f}, then {after:,.0f}")
    return found


@contextlib.contextmanager
def process(*command: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **options.pop("env", {})}
    with subprocess.Popen([sys.executable, *command], env=environment, text=True, **options) as started:
        try:
            yield started
        finally:
            started.terminate()
            try:
                started.wait(60)
            except subprocess.TimeoutExpired:
                started.kill()


@contextlib.contextmanager
def step_downs(replica_set: ReplicaSet, every_s: float) -> Iterator[list[int]]:
    """The primary steps down again and again; how often so far."""
    over, done = threading.Event(), [0]

    def torment() -> None:
        while not over.wait(every_s):
            done[0] += replica_set.step_down()

    thread = threading.Thread(target=torment)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


def apply_schedules(db: Datalayer) -> None:
    fill(db)
    for name, trigger in TRIGGERS.items():
        made = trainer(db[COLLECTION].find(), model=model(identifier=f"m-{name}")).replace(identifier=f"t-{name}")
        db.apply(Schedule(name, trainer=made, trigger=trigger, gate=Always()))


def ended(db: Datalayer) -> int:
    return int(retried(lambda: db["mt.jobs"].raw.count_documents({"status": "succeeded"})))


def sampled(pids: list[int], seconds: float) -> dict[int, list[Held]]:
    """What the processes and their children hold, once a second."""
    samples: dict[int, list[Held]] = defaultdict(list)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for pid in (each for top in pids for each in family(top)):
            with contextlib.suppress(OSError):  # it has ended
                samples[pid].append(Held.by(pid))
        time.sleep(min(1.0, seconds / 30))
    most = max(map(len, samples.values()))
    return {pid: found for pid, found in samples.items() if len(found) > 0.8 * most}


def title(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return "ended"
    kinds = {"mongotorch worker": "worker", "forkserver": "jobs", "tracker": "tracker", "db.live": "follower"}
    return next((kind for word, kind in kinds.items() if word in words), words[:40])


@pytest.mark.parametrize(
    ("seconds", "every_s", "allowed"),
    [
        # A third are five seconds here: the driver may have more threads and connections just after an election.
        pytest.param(15.0, 6.0, Held(48 * 2**20, 8, 8), id="short"),
        pytest.param(
            1800.0, 20.0, Held(4 * 2**20, 2, 3), marks=[pytest.mark.soak, pytest.mark.timeout(3600)], id="whole"
        ),
    ],
)
def test_what_processes_hold_is_flat_over_time(
    replica_set: ReplicaSet, tmp_path: Path, seconds: float, every_s: float, allowed: Held
) -> None:
    given: dict[str, Any] = {"compute": "queue", "progress": False, "lease_s": 5.0, "valid_fraction": 0.2}
    settings = {f"MONGOTORCH_{name.upper()}": json.dumps(value).strip('"') for name, value in given.items()}
    settings["MONGOTORCH_URI"] = uri = replica_set.uri
    logs = [tmp_path / f"worker-{n}.log" for n in range(2)]
    with contextlib.ExitStack() as opened:
        db = opened.enter_context(Datalayer.connect(uri, **given))
        apply_schedules(db)
        pids = []
        for log in logs:
            stderr = opened.enter_context(log.open("w"))
            command = ("-m", "mongotorch", "worker", "--log-format", "json")
            streams = {"stderr": stderr, "stdout": subprocess.DEVNULL}
            pids.append(opened.enter_context(process(*command, env=settings, **streams)).pid)
        follower = opened.enter_context(
            process("-c", textwrap.dedent(FOLLOWER), uri, SERVED, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
        with process("-c", textwrap.dedent(FOREIGN), uri, COLLECTION):
            deadline = time.monotonic() + 120
            while ended(db) < 8:  # everything that is loaded once is loaded
                assert time.monotonic() < deadline
                time.sleep(0.5)
            before = ended(db)
            with step_downs(replica_set, every_s) as done:
                samples = sampled([*pids, follower.pid], seconds)
        titles = {pid: title(pid) for pid in samples}
        for name in TRIGGERS:
            retried(lambda name=name: db.pause(name))
        deadline = time.monotonic() + 120
        while open_jobs := [job for job in retried(lambda: db.jobs(limit=0)) if not retried(job.done)]:
            assert time.monotonic() < deadline, open_jobs
            time.sleep(0.5)
        statuses = {retried(lambda job=job: job.status) for job in retried(lambda: db.jobs(limit=0))}
        versions, predictions = map(int, follower.communicate(timeout=60)[0].split())
        print(f"{seconds:g} s: {ended(db) - before} runs, {done[0]} step-downs, {versions} versions served")
        for pid, found in samples.items():
            third = len(found) // 3
            parts = [found[:third], found[third : 2 * third], found[2 * third :]]
            shown = [
                "/".join(f"{statistics.median(getattr(one, name) for one in part) / unit:.1f}" for part in parts)
                for name, unit in (("nbytes", 2**20), ("threads", 1), ("descriptors", 1))
            ]
            print(f"{titles[pid]} {pid}: {shown[0]} MiB, {shown[1]} threads, {shown[2]} descriptors")
    assert statuses == {"succeeded"}
    assert versions >= 2
    assert predictions > seconds
    assert len(samples) >= 5
    bad = {pid: words for pid, found in samples.items() if (words := grown(found, allowed))}
    assert not bad, bad
