"""One rank: one of several processes that train one model, or predict documents, together.

A launcher calls `rank_main` or `prediction_main` in each of them. `run_job` is for processes that somebody else
has started, by `torchrun`, Slurm or an operator of Kubernetes. They find each other by the environment of
`torch.distributed`, and open the database themselves.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
import torch.distributed as dist

from mongotorch.datalayer import Datalayer
from mongotorch.errors import (
    JobCancelledError,
    JobReleasedError,
    NotFoundError,
    SettingError,
    WorkerLostError,
)
from mongotorch.jobs import environment
from mongotorch.jobs.failures import RUNTIME_MARGIN_S, too_long
from mongotorch.jobs.launchers.joined import dismiss, follow
from mongotorch.resources import keep_freed_memory, on_signal
from mongotorch.services.training.ranks import same_versions
from mongotorch.settings import read_settings
from mongotorch.train import Alone, Group, ProcessGroup

_CLAIM_S: Final = 60.0  # how much longer than a lease `run_job` waits for its job
_POLL_S: Final = 0.5
GROUP_TIMEOUT_S: Final = 600.0
"""How long a rank waits for the others, where the network does not say that they are gone."""


def rank_main(*, settings: Mapping[str, Any], job_id: str, attempt: int, is_elsewhere: bool) -> None:
    """Be one rank of a run; returns when its last step is made.

    Args:
        settings: Of the datalayer that this process opens.
        job_id: The job, which another process has claimed.
        attempt: The attempt that was claimed.
        is_elsewhere: Whether this process may be on another machine than that one: its environment says where the
            database is.

    Raises:
        SettingError: The environment of this process names no database, or another one.
        ServerUnavailableError: The database cannot be reached from here.
        MongotorchError: The run failed, here or on another rank.
    """
    with _opened(settings, is_elsewhere) as db:
        if is_elsewhere:
            with _same_database(db, f"job {job_id}"):
                db.job(job_id)
        with joined_group() as group:
            db.runner.run_rank(job_id, attempt, group)


def prediction_main(*, settings: Mapping[str, Any], record: str, call: str, is_elsewhere: bool) -> None:
    """Predict the documents of one rank; returns when all of them are written.

    Args:
        settings: Of the datalayer that this process opens.
        record: The record of the prediction.
        call: The name of the call in it.
        is_elsewhere: As for `rank_main`.

    Raises:
        SettingError: As `rank_main`.
        ServerUnavailableError: The database cannot be reached from here.
        MongotorchError: A document cannot be predicted.
    """
    with (
        _opened(settings, is_elsewhere) as db,
        joined_group() as group,
        _same_database(db, "such prediction") if is_elsewhere else contextlib.nullcontext(),
    ):
        same_versions(group, environment())
        db.predictor.predict_rank(record, call, group)


def _opened(settings: Mapping[str, Any], is_elsewhere: bool) -> Datalayer:
    """The database of a rank. Raises: SettingError, ServerUnavailableError."""
    if is_elsewhere and read_settings(**settings).uri is None and read_settings(**settings).uri_file is None:
        raise SettingError(
            f"MONGOTORCH_URI is not set on {socket.gethostname()}; every machine that runs workers has to "
            "have the address of the database in its environment",
            setting="uri",
        )
    return Datalayer.connect(**settings)


def run_job(job_id: str, *, uri: str | None = None, **settings: Any) -> str:
    """Run one job in the processes that have this environment of `torch.distributed`; all of them call it.

    Rank 0 claims the job, waits for the lease of an attempt that was killed, and publishes. At SIGTERM it writes a
    checkpoint and hands the job back. Where the attempt takes longer than `max_runtime_s`, the job fails, and the
    process ends even if a step does not.

    Args:
        job_id: The job, as `db.apply` with `compute="queue"` has made it.
        uri: The database; None is the settings'.
        settings: As for `Datalayer.connect`.

    Returns:
        What became of the job here: `succeeded`, `failed`, `cancelled`, `released`, or `running` where another
        process has it.

    Raises:
        NotFoundError: There is no such job.
        ServerUnavailableError: The database cannot be reached.
        MongotorchError: On another rank than 0: what the run raised there.
    """
    with joined_group() as group:
        is_alone = isinstance(group, Alone)
        with Datalayer.connect(uri, **settings, **({} if is_alone else {"launcher": "joined"})) as db:
            job_id = db.job(job_id).uuid
            stop = threading.Event()
            with on_signal(stop.set):
                if group.rank == 0:
                    return _lead(db, job_id, stop, is_alone=is_alone)
                return _followed(db, job_id)


def _lead(db: Datalayer, job_id: str, stop: threading.Event, *, is_alone: bool) -> str:
    """Be rank 0: claim the job and run it."""
    job = _claimed(db, job_id, stop)
    if job is None:
        outcome = db.job(job_id).status
    else:
        with _ends_in_time(db, job):
            outcome = db.runner.run_claimed(job, stop)
    if not is_alone and (job is None or outcome == "succeeded"):
        dismiss()  # else the others hear of it by the end of this process
    return outcome


@contextlib.contextmanager
def _ends_in_time(db: Datalayer, job: Mapping[str, Any]) -> Iterator[None]:
    """End this process where what is inside takes longer than it may: no worker watches it.

    A run looks at its time between two steps, and so comes to an end by itself where its steps do.
    """
    limit_s = job.get("max_runtime_s") or db.settings.max_runtime_s
    ended = threading.Event()

    def watch() -> None:
        if ended.wait((limit_s or 0.0) + RUNTIME_MARGIN_S):
            return
        try:
            db.runner.fail_killed(job["_id"], job["attempt"], too_long(job["_id"], limit_s or 0.0), retry=False)
        finally:
            os._exit(1)  # whoever has started the processes ends the others

    if limit_s:
        threading.Thread(target=watch, name="mongotorch-limit", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _claimed(db: Datalayer, job_id: str, stop: threading.Event) -> dict[str, Any] | None:
    """The claimed job; None where it has ended, or another process goes on with it."""
    deadline = time.monotonic() + db.settings.lease_s + _CLAIM_S
    while not stop.is_set():
        job = db.runner.claim(job_id)
        if job is not None or db.job(job_id).done() or time.monotonic() > deadline:
            return job
        stop.wait(_POLL_S)
    return None


def _followed(db: Datalayer, job_id: str) -> str:
    """Be another rank: do what rank 0 asks for, and record an error, which rank 0 may not live to see."""
    try:
        while follow():
            pass
    except (JobCancelledError, JobReleasedError, WorkerLostError):
        raise
    except Exception as error:
        db.runner.fail_rank(job_id, error)
        raise
    return db.job(job_id).status


@contextlib.contextmanager
def _same_database(db: Datalayer, what: str) -> Iterator[None]:
    """Let what is not found inside say that this is another database."""
    try:
        yield
    except NotFoundError as error:
        raise SettingError(
            f"MONGOTORCH_URI on {socket.gethostname()} names {db!r}, in which there is no {what}: it is "
            "another database than that of the process that has started the run",
            setting="uri",
        ) from error


@contextlib.contextmanager
def joined_group() -> Iterator[Group]:
    """The group of this process: the one that exists, else that of the environment; else this rank alone."""
    if not dist.is_initialized() and "WORLD_SIZE" not in os.environ:
        yield Alone()
        return
    keep_freed_memory()
    if dist.is_initialized():
        yield ProcessGroup()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=GROUP_TIMEOUT_S))
    yield ProcessGroup()
    dist.destroy_process_group()  # not after an error: it may wait for ranks that are gone
