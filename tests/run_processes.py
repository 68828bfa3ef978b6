"""Runs in processes of their own, which tests kill: what they train, and how they are started.

A process is forked from a server that has torch loaded and no connection open, so that it starts in
milliseconds; nothing but an address and numbers crosses to it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch
from pymongo import monitoring

from mongotorch import Datalayer, TorchModel, TorchTrainer, Worker
from mongotorch.errors import MongotorchError

# The first optimizer of a process makes torch load its compiler, which takes seconds: once, in the server.
torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])

WRITES = frozenset({"insert", "update", "delete", "findAndModify"})
SETTINGS: dict[str, Any] = {
    "compute": "queue",
    "progress": False,
    "lease_s": 1.0,
    "checkpoint_seconds": 0.02,
}


def context() -> Any:
    """Where processes are forked from."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.run_processes"])
    return found


def fill(db: Datalayer, count: int = 400) -> None:
    """Documents to train on: the same in every database."""
    generator = torch.Generator().manual_seed(1)
    xs = torch.randn(count, 6, generator=generator)
    db["rows"].insert_many({"_id": n, "x": x, "y": int(x.sum() > 0)} for n, x in enumerate(xs))


def trainer(db: Datalayer, name: str, *, in_memory: bool, steps: int = 120) -> TorchTrainer:
    """A run with everything random that there is: order, dropout, momentum, the best of several validations."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(6, 16),
        torch.nn.BatchNorm1d(16),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.3),
        torch.nn.Linear(16, 2),
    )
    return TorchTrainer(
        f"{name}-trainer",
        key=("x", "y"),
        select=db["rows"].find(),
        objective=torch.nn.functional.cross_entropy,
        loader_kwargs={"batch_size": 16, "shuffle": True},
        in_memory=in_memory,
        data_prefetch=True,
        prefetch_size=50,
        max_iterations=steps,
        validation_interval=25,
        no_improve_then_stop=100,
        model=TorchModel(name, object=net),
    )


def weights(model: TorchModel) -> dict[str, torch.Tensor]:
    """The weights and buffers of a published model, and the state of its optimizer."""
    trained: Any = model.trainer
    moments = {f"{n}.{k}": v for n, state in trained.optimizer_state["state"].items() for k, v in state.items()}
    return {**model.object.state_dict(), **moments}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether all are equal, bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def start(target: Any, *arguments: Any) -> ForkServerProcess:
    """A process that runs a function of this module."""
    process: ForkServerProcess = context().Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def work(uri: str) -> None:
    """Be a worker until no job waits or runs; ends itself."""
    torch.set_num_threads(1)
    with Datalayer.connect(uri, **SETTINGS) as db:
        while db.jobs(status="queued") or db.jobs(status="running"):
            Worker(db).run(until_idle=True)


def schedule(uri: str) -> None:
    """Be a scheduler until killed."""
    with Datalayer.connect(uri, **{**SETTINGS, "lease_s": 0.5}) as db:
        db.scheduler.run(threading.Event())


class Killer(monitoring.CommandListener):
    """Kills its own process at one write of the database: just before it is sent, or just after it is done."""

    def __init__(self, at: int, *, after: bool) -> None:
        # Blobs are written from several threads: what has begun and what is done are counted apart.
        self._at, self._after = at, after
        self._counts = {False: 0, True: 0}
        self._lock = threading.Lock()

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        self._count(event.command_name, done=False)

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        self._count(event.command_name, done=True)

    def _count(self, command: str, *, done: bool) -> None:
        if command not in WRITES:
            return
        with self._lock:
            self._counts[done] += 1
            if done == self._after and self._counts[done] == self._at:
                os.kill(os.getpid(), signal.SIGKILL)

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        """Nothing was written."""


def work_once(uri: str, at: int, after: bool) -> None:
    """Perform one job; die at one of the writes on the way."""
    torch.set_num_threads(1)
    monitoring.register(Killer(at, after=after))
    # No checkpoint by time: the writes of a run are the same each time, so that they can be enumerated.
    with Datalayer.connect(uri, **{**SETTINGS, "checkpoint_seconds": 1000.0, "lease_s": 0.3}) as db:
        Worker(db).once()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread inside, as in the workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def work_alone(uri: str, jobs: int) -> None:
    """Perform the most urgent jobs here, undisturbed."""
    with one_thread(), Datalayer.connect(uri, **SETTINGS) as db:
        for _ in range(jobs):
            assert Worker(db).once()


def apply_and_die(uri: str, step: int) -> None:
    """Train here, as `apply` does without a queue, and be killed after a step that a checkpoint covers."""
    torch.set_num_threads(1)
    with Datalayer.connect(uri, **{**SETTINGS, "compute": "local"}) as db:
        threading.Thread(target=_die_after, args=(uri, step), daemon=True).start()
        db.apply(trainer(db, "again", in_memory=True, steps=60))


def _die_after(uri: str, step: int) -> None:
    with Datalayer.connect(uri) as db:
        while not db["mt.checkpoints"].raw.find_one({"step": {"$gte": step}}):
            pass
        os.kill(os.getpid(), signal.SIGKILL)


def finish(db: Datalayer, job: str) -> None:
    """Work here until a job has ended: as soon as the lease of its dead worker is over."""
    with one_thread():
        while not db.job(job).done():
            Worker(db).run(until_idle=True)


def unreached(db: Datalayer) -> list[str]:
    """What `gc` should have left nothing of: blobs that no document names, documents that are not visible."""
    documents = list(db["mt.components"].raw.find())
    named = {blob for document in documents for blob in document["blobs"]}
    blobs = [file["filename"] for file in db["mt.artifacts.files"].raw.find() if file["filename"] not in named]
    files = set(db["mt.artifacts.files"].raw.distinct("_id"))
    chunks = [str(found) for found in db["mt.artifacts.chunks"].raw.distinct("files_id") if found not in files]
    there = {document["_id"] for document in documents}
    hidden = [document["_id"] for document in documents if document.get("anchor", document["_id"]) not in there]
    return blobs + chunks + hidden


def work_under_elections(uri: str) -> None:
    """Be a worker until killed, also while there is no primary."""
    torch.set_num_threads(1)
    while True:
        with contextlib.suppress(MongotorchError), Datalayer.connect(uri, **{**SETTINGS, "lease_s": 5.0}) as db:
            Worker(db).run()


def apply_eight_times(uri: str, compute: str) -> None:
    """Apply the same trainer from eight threads at once, and wait for each job."""
    torch.set_num_threads(1)
    with Datalayer.connect(uri, **{**SETTINGS, "compute": compute, "lease_s": 30.0}) as db:
        applied = trainer(db, "same", in_memory=True, steps=20)
        with ThreadPoolExecutor(8) as pool:
            jobs = list(pool.map(lambda _: db.apply(applied), range(8)))
        assert len({job.result(timeout=100).uuid for job in jobs}) == 1
