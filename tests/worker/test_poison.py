"""Jobs that kill, block or leave their process: they fail and say why, and the others are run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import poison
from tests.helpers import fill, model, trainer

from mongotorch import Datalayer, TorchTrainer
from mongotorch.errors import ServerUnavailableError
from mongotorch.services.training.job_runner import JobRunner
from mongotorch.worker import Supervisor

pytestmark = pytest.mark.fault
ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {"compute": "queue", "progress": False, "max_runtime_s": 4.0}


def bad(db: Datalayer, objective: Callable[..., Any], name: str, **given: Any) -> TorchTrainer:
    usual = {"max_iterations": 2, "validation_interval": 2, "data_prefetch": False, "in_memory": True}
    made = {**usual, "objective": objective, "model": model(identifier=name), **given}
    return trainer(db["points"].find(), **made).replace(identifier=f"{name}-trainer")


def worker(uri: str, log: Path, *options: str, **environment: str) -> subprocess.Popen[bytes]:
    """A worker command, which writes into a file: a pipe that nobody reads would stop it."""
    own = {"MONGOTORCH_URI": uri, "MONGOTORCH_STOP_GRACE_S": "1", "OMP_NUM_THREADS": "1"}
    own["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "plugin")])  # this tree, whatever is installed
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "mongotorch", "worker", *options],
            env={**os.environ, **own, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )


def processes_below(pid: int) -> set[int]:
    """The ids of all processes that a process has started, and those have."""
    parents: dict[int, int] = {}
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            try:
                fields = (each / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(each.name)] = int(fields[1])
    found: set[int] = set()
    more = {pid}
    while more:
        more = {child for child, parent in parents.items() if parent in more} - found
        found |= more
    return found


def alive(pids: set[int]) -> set[int]:
    """Those that still run, zombies left out."""
    found: set[int] = set()
    for pid in pids:
        try:
            state = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            found.add(pid)
    return found


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "too late"
        time.sleep(0.05)


@pytest.fixture
def queue(server_uri: str) -> Iterator[Datalayer]:
    with Datalayer.connect(server_uri, **SETTINGS) as db:
        fill(db)
        yield db


def test_poison_of_every_kind_among_a_hundred_good_jobs(queue: Datalayer, server_uri: str, tmp_path: Path) -> None:
    good = [queue.apply(bad(queue, poison.good, f"good-{n}")) for n in range(50)]
    jobs = {one: queue.apply(bad(queue, one, one.__name__.replace("_", "-"))) for one in poison.POISON}
    good += [queue.apply(bad(queue, poison.good, f"good-{n}")) for n in range(50, 100)]
    process = worker(server_uri, log := tmp_path / "log", "--concurrency", "2")
    seen: set[int] = set()
    try:

        def ended() -> bool:
            seen.update(processes_below(process.pid))
            assert process.poll() is None, log.read_text()
            return all(job.done() for job in [*good, *jobs.values()])

        wait_until(ended, 240)
        assert len(alive(processes_below(process.pid))) >= 3  # two children, and what they are forked from
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    output = log.read_text()
    assert process.returncode == 0, output
    wait_until(lambda: not alive(seen), 10)

    assert [job.status for job in good] == ["succeeded"] * 100
    for one, says in poison.POISON.items():
        job = jobs[one]
        assert job.status in ("failed", "succeeded" if not says else "failed"), (one.__name__, job)
        told = f"{(job.error or {}).get('type')}: {(job.error or {}).get('message')}"
        assert says in told or job.status == "succeeded", (one.__name__, told)
        assert "secret" not in str(job.record)
        assert job.record["attempt"] <= 4, one.__name__
    assert "secret" not in output
    assert queue.jobs(status="running") == []


def started(job: Any) -> bool:
    return bool(job.status == "running")


@pytest.mark.parametrize("objective", [poison.never_ends, poison.holds_the_interpreter, poison.stops_itself])
def test_a_run_that_ignores_everything_is_killed_when_it_is_cancelled_or_the_worker_stops(
    server_uri: str, tmp_path: Path, objective: Callable[..., Any]
) -> None:
    with Datalayer.connect(server_uri, compute="queue", progress=False) as db:
        fill(db)
        job = db.apply(bad(db, objective, "endless"))
        process = worker(server_uri, tmp_path / "log")
        try:
            wait_until(lambda: started(job))
            assert job.cancel()
            good = db.apply(bad(db, poison.good, "good"))
            assert good.result(timeout=60).version == 1
            again = db.apply(bad(db, objective, "again"))
            wait_until(lambda: started(again))
            seen = processes_below(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)
        assert process.returncode == 0, (tmp_path / "log").read_text()
        assert (job.status, again.status) == ("cancelled", "queued")
        wait_until(lambda: not alive(seen), 10)


def test_a_worker_that_is_killed_takes_its_processes_along(server_uri: str, tmp_path: Path) -> None:
    with Datalayer.connect(server_uri, compute="queue", progress=False) as db:
        fill(db)
        job = db.apply(bad(db, poison.never_ends, "endless"))
        process = worker(server_uri, tmp_path / "log")
        wait_until(lambda: started(job))
        seen = processes_below(process.pid)
        process.kill()
        process.wait()
        assert len(seen) >= 2
        wait_until(lambda: not alive(seen), 10)


def test_a_run_goes_on_while_nobody_can_say_whether_it_holds_its_job(
    server_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> bool:
        raise ServerUnavailableError("the database is away")

    with Datalayer.connect(server_uri, compute="queue", progress=False, stop_grace_s=0.1) as db:
        fill(db)
        job = db.apply(bad(db, poison.slow, "slow", max_iterations=12))  # the worker looks at it each second
        monkeypatch.setattr(JobRunner, "holds", away)  # in this process, and not in that of the run
        assert Supervisor(db).run("once").failed == 0
        assert (job.status, job.record["attempt"]) == ("succeeded", 1)


def test_the_exit_code_says_whether_an_attempt_failed(server_uri: str, tmp_path: Path) -> None:
    with Datalayer.connect(server_uri, compute="queue", progress=False) as db:
        fill(db)
        for objective, code, option in (
            *((poison.good, 0, "--until-idle"), (poison.is_not_finite, 1, "--until-idle")),
            *((poison.good, 0, "--once"), (poison.exits_with_0, 1, "--once")),
        ):
            job = db.apply(bad(db, objective, f"{objective.__name__}{option}".replace("_", "-")))
            process = worker(server_uri, log := tmp_path / "log", option, "--log-format", "json")
            assert process.wait(timeout=100) == code, log.read_text()
            lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
            assert {job.uuid} <= {line.get("job") for line in lines}
            events = [line["event"] for line in lines if line.get("job") == job.uuid]
            assert events[0] == "claimed"
            assert events[-1] == ("failed" if code else "succeeded")
            assert f"1 job(s) performed, {code} failed" in log.read_text()
