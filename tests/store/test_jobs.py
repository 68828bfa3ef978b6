"""A job is claimed once, held under a lease, fenced by its attempt, and ends once. On both backends."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import mongomock
import pytest

from mongotorch.errors import JobTimeoutError, NotFoundError
from mongotorch.mongo.server_features import is_mock, utc_now
from mongotorch.store import Jobs
from mongotorch.store.jobs import BACK_OFF_S, MAX_BACK_OFF_S, MAX_LOSSES, MAX_LOSSES_IN_ALL

ERROR = {"type": "ValueError", "message": "no", "traceback": "…", "document_id": None, "field": None}


@pytest.fixture
def jobs(database: Any) -> Jobs:
    jobs = Jobs(database)
    jobs.ensure_indexes()
    return jobs


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1)

    def __call__(self) -> datetime:
        return self.now

    def turn(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timed(database: Any, clock: Clock) -> Jobs:
    return Jobs(database, now=clock)


def add(jobs: Jobs, component: str = "c", **more: Any) -> str:
    return jobs.add(component=component, type_id="trainer", identifier="digits", **more)[0]


def claim(jobs: Jobs, **more: Any) -> dict[str, Any]:
    claimed = jobs.claim(**{"worker": "w", "lease_s": 60.0, **more})
    assert claimed is not None
    return claimed


def test_a_new_job_is_queued_with_everything_a_person_asks_for(jobs: Jobs) -> None:
    job = jobs.get(add(jobs, parameters={"max_iterations": 10**100, "rate": 0.1, "$odd.name": {1: [object]}}))

    assert (job["status"], job["method"], job["attempt"], job["max_attempts"]) == ("queued", "fit", 0, 3)
    assert job["parameters"] == {
        "max_iterations": str(10**100),
        "rate": 0.1,
        "_odd_name": {"1": ["<class 'object'>"]},
    }
    assert abs(job["created"] - utc_now()) < timedelta(minutes=1)
    for empty in ("started", "finished", "lease_until", "worker", "error", "result"):
        assert job[empty] is None


def test_no_password_and_no_expression_gets_into_a_document(jobs: Jobs) -> None:
    job_id = add(jobs, parameters={"uri": "mongodb://me:secret@host/db", "text": "$status"})
    attempt = claim(jobs, worker="$worker", environment={"python": "$$NOW"})["attempt"]
    jobs.heartbeat(job_id, attempt, lease_s=60, progress={"note": "$attempt"})

    job = jobs.get(job_id)
    assert job["parameters"] == {"uri": "mongodb://me:***@host/db", "text": "$status"}
    assert (job["worker"], job["environment"], job["progress"]) == (
        "$worker",
        {"python": "$$NOW"},
        {"note": "$attempt"},
    )


def test_a_job_is_unique_by_component_and_method_and_by_key(jobs: Jobs) -> None:
    first = add(jobs)

    assert jobs.add(component="c", type_id="trainer", identifier="digits") == (first, False)
    other, new = jobs.add(component="c", type_id="trainer", identifier="digits", method="test", key="k")
    assert new
    assert jobs.add(component="z", type_id="trainer", identifier="digits", key="k") == (other, False)
    assert add(jobs, "d") not in {first, other}  # no key is no key in common
    assert len(jobs.find()) == 3


def test_what_is_unknown_is_said(jobs: Jobs) -> None:
    with pytest.raises(NotFoundError):
        jobs.get("nothing")
    with pytest.raises(NotFoundError):
        jobs.cancel("nothing")
    with pytest.raises(NotFoundError):
        jobs.wait("nothing", 1)


def test_the_most_urgent_then_the_oldest_is_claimed_first(timed: Jobs, clock: Clock) -> None:
    added = []
    for component, priority in (("a", 0), ("b", 5), ("c", 5), ("d", -1)):
        added.append(add(timed, component, priority=priority))
        clock.turn(1)

    assert [claim(timed)["_id"] for _ in added] == [added[1], added[2], added[0], added[3]]
    assert timed.claim(worker="w", lease_s=60) is None
    assert [job["_id"] for job in timed.find()] == added[::-1]
    assert [job["_id"] for job in timed.find(status="running", component="b", identifier="digits")] == [added[1]]
    assert len(timed.find(limit=2)) == 2


def test_a_claim_may_ask_for_one_job(jobs: Jobs) -> None:
    add(jobs, "a", priority=9)
    wanted = add(jobs, "b")

    assert claim(jobs, job_id=wanted)["_id"] == wanted
    assert jobs.claim(worker="w", lease_s=60, job_id=wanted) is None


def test_each_job_is_claimed_once_however_many_ask(jobs: Jobs) -> None:
    added = {add(jobs, f"c{n}") for n in range(40)}
    together = threading.Barrier(8)

    def work(worker: int) -> list[str]:
        together.wait()
        got = []
        while (job := jobs.claim(worker=str(worker), lease_s=60)) is not None:
            got.append(job["_id"])
        return got

    with ThreadPoolExecutor(8) as pool:
        got = [job_id for part in pool.map(work, range(8)) for job_id in part]

    assert sorted(got) == sorted(added)


def test_one_of_many_who_add_the_same_makes_the_job(jobs: Jobs) -> None:
    together = threading.Barrier(8)

    def work(_: int) -> tuple[str, bool]:
        together.wait()
        return jobs.add(component="c", type_id="trainer", identifier="digits")

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(work, range(8)))

    assert len({job_id for job_id, _ in made}) == 1
    assert [new for _, new in made].count(True) == 1


def test_a_holder_that_went_silent_is_fenced_out(timed: Jobs, clock: Clock) -> None:
    job_id = add(timed)
    zombie = claim(timed, lease_s=30)["attempt"]
    clock.turn(29)
    assert timed.claim(worker="b", lease_s=30) is None
    assert timed.heartbeat(job_id, zombie, lease_s=30)
    clock.turn(29)
    assert timed.claim(worker="b", lease_s=30) is None  # the heartbeat counted
    clock.turn(1)

    heir = claim(timed, worker="b", lease_s=30)

    assert heir["attempt"] == zombie + 1
    assert not timed.holds(job_id, zombie)
    assert not timed.heartbeat(job_id, zombie, lease_s=30, progress={"step": 9})
    assert not timed.succeed(job_id, zombie, result="wrong")
    assert not timed.fail(job_id, zombie, error=ERROR)
    assert not timed.fail(job_id, zombie, error=ERROR, retry=True)
    assert not timed.release(job_id, zombie)
    assert timed.get(job_id) == heir
    assert timed.succeed(job_id, heir["attempt"], result="right")
    assert (timed.get(job_id)["status"], timed.get(job_id)["result"]) == ("succeeded", "right")
    assert not timed.succeed(job_id, heir["attempt"], result="again")


def test_a_failed_run_is_tried_again_later_each_time_until_its_attempts_are_used(
    timed: Jobs, clock: Clock
) -> None:
    job_id = add(timed, max_attempts=3)
    for failures in (1, 2):
        assert timed.fail(job_id, claim(timed)["attempt"], error=ERROR, retry=True)
        job = timed.get(job_id)
        assert (job["status"], job["failures"], job["error"]["message"]) == ("queued", failures, "no")
        clock.turn(BACK_OFF_S * 2 ** (failures - 1) - 0.1)
        assert timed.claim(worker="w", lease_s=60) is None
        clock.turn(0.1)

    assert timed.fail(job_id, claim(timed)["attempt"], error=ERROR, retry=True)

    job = timed.get(job_id)
    assert (job["status"], job["failures"], job["finished"]) == ("failed", 3, clock.now)
    assert job["error"] == ERROR


def test_the_back_off_has_an_end(timed: Jobs, clock: Clock) -> None:
    job_id = add(timed, max_attempts=100)
    for _ in range(40):
        timed.fail(job_id, claim(timed)["attempt"], error=ERROR, retry=True)
        clock.turn(MAX_BACK_OFF_S)

    assert timed.get(job_id)["attempt"] == 40


def test_a_failure_that_no_retry_mends_is_final_at_once(jobs: Jobs) -> None:
    job_id = add(jobs)

    assert jobs.fail(job_id, claim(jobs)["attempt"], error=ERROR)

    assert jobs.get(job_id)["status"] == "failed"
    assert jobs.claim(worker="w", lease_s=60) is None


def test_a_job_that_is_handed_back_is_claimed_again_at_once_and_not_counted(jobs: Jobs) -> None:
    job_id = add(jobs, max_attempts=1)
    for attempt in (1, 2, 3):
        assert claim(jobs)["attempt"] == attempt
        assert jobs.release(job_id, attempt)

    assert (jobs.get(job_id)["failures"], jobs.get(job_id)["status"]) == (0, "queued")


def test_a_job_that_only_kills_its_workers_fails_in_the_end(timed: Jobs, clock: Clock) -> None:
    job_id = add(timed)
    for _ in range(MAX_LOSSES):
        claim(timed, lease_s=10)
        clock.turn(10)

    assert timed.claim(worker="w", lease_s=10) is None
    assert timed.get(job_id)["status"] == "failed"
    assert "lack of memory" in timed.get(job_id)["error"]["message"]


def test_a_job_that_gets_further_survives_lost_workers(timed: Jobs, clock: Clock) -> None:
    job_id = add(timed)
    for step in range(MAX_LOSSES * 3):
        attempt = claim(timed, lease_s=10)["attempt"]
        assert timed.heartbeat(job_id, attempt, lease_s=10, progress={"step": step}, reached=step)
        clock.turn(10)

    assert timed.succeed(job_id, claim(timed)["attempt"], result="r")


def test_a_heartbeat_without_a_further_step_is_no_progress(timed: Jobs, clock: Clock) -> None:
    job_id = add(timed)
    for _ in range(MAX_LOSSES):
        attempt = claim(timed, lease_s=10)["attempt"]
        assert timed.heartbeat(job_id, attempt, lease_s=10, progress={"step": 3})
        clock.turn(10)

    assert timed.claim(worker="w", lease_s=10) is None
    assert timed.get(job_id)["status"] == "failed"


def test_lost_workers_are_counted_in_all_though_each_got_further(timed: Jobs, clock: Clock) -> None:
    job_id = add(timed)
    timed.release(job_id, claim(timed)["attempt"])
    for step in range(MAX_LOSSES_IN_ALL + 1):
        attempt = claim(timed, lease_s=10)["attempt"]
        assert timed.get(job_id)["losses"] == step
        timed.heartbeat(job_id, attempt, lease_s=10, reached=step + 1)
        clock.turn(10)

    assert timed.claim(worker="w", lease_s=10) is None
    assert "in all" in timed.get(job_id)["error"]["message"]


def test_failures_are_counted_anew_when_the_run_got_further(timed: Jobs, clock: Clock) -> None:
    job_id = add(timed, max_attempts=2)
    for step in (5, 9, 12):
        attempt = claim(timed)["attempt"]
        timed.heartbeat(job_id, attempt, lease_s=10, reached=step)
        assert timed.fail(job_id, attempt, error=ERROR, retry=True)
        assert timed.get(job_id)["failures"] == 1
        clock.turn(BACK_OFF_S)

    assert timed.fail(job_id, claim(timed)["attempt"], error=ERROR, retry=True)
    assert timed.get(job_id)["status"] == "failed"


def test_a_run_that_was_killed_because_it_did_not_stop_counts_as_lost(jobs: Jobs) -> None:
    job_id = add(jobs)
    for _ in range(MAX_LOSSES):
        assert jobs.release(job_id, claim(jobs)["attempt"], killed=True)

    assert jobs.claim(worker="w", lease_s=60) is None
    assert jobs.get(job_id)["status"] == "failed"


@pytest.mark.parametrize("field", ["type_id", "component", "identifier", "attempt", "seen", "reached", "created"])
@pytest.mark.parametrize("value", [None, "text", [1], "gone"])
def test_a_broken_document_stops_no_worker(jobs: Jobs, database: Any, field: str, value: Any) -> None:
    broken = add(jobs, "a", priority=9)
    change = {"$unset": {field: ""}} if value == "gone" else {"$set": {field: value}}
    if value is not None or field != "created":
        database["mt.jobs"].update_one({"_id": broken}, change)
    good = add(jobs, "b")

    claimed = [jobs.claim(worker="w", lease_s=60) for _ in range(3)]

    assert good in [job["_id"] for job in claimed if job is not None]
    for job in claimed:
        if job is not None:
            assert jobs.heartbeat(job["_id"], job["attempt"], lease_s=60, progress={"step": 1}, reached=1)
            assert jobs.fail(job["_id"], job["attempt"], error=ERROR)
    job = jobs.get(broken)
    assert job["status"] == "failed"
    if field in ("type_id", "component", "identifier") and value != "text":
        assert (job["error"]["type"], job["error"]["field"]) == ("FormatError", field)


def test_a_waiting_job_is_cancelled_for_good(jobs: Jobs) -> None:
    job_id = add(jobs)

    assert jobs.cancel(job_id)

    assert jobs.get(job_id)["status"] == "cancelled"
    assert jobs.claim(worker="w", lease_s=60) is None
    assert not jobs.cancel(job_id)


def test_who_runs_a_cancelled_job_hears_of_it_and_cannot_publish(jobs: Jobs) -> None:
    job_id = add(jobs)
    attempt = claim(jobs)["attempt"]

    assert jobs.cancel(job_id)

    assert not jobs.heartbeat(job_id, attempt, lease_s=60)
    assert not jobs.holds(job_id, attempt)
    assert not jobs.succeed(job_id, attempt, result="r")
    assert not jobs.fail(job_id, attempt, error=ERROR, retry=True)
    assert jobs.get(job_id)["status"] == "cancelled"


def test_what_has_ended_since_a_time_is_read_without_the_jobs_before(jobs: Jobs, database: Any) -> None:
    days = [{"_id": f"j{n}", "component": f"c{n}", "method": "fit", "format": 1} for n in range(300)]
    begun = datetime(2026, 1, 1)
    ended = [{**one, "status": "succeeded", "finished": begun + timedelta(days=n)} for n, one in enumerate(days)]
    database["mt.jobs"].insert_many(ended)
    assert [job["_id"] for job in jobs.ended(begun + timedelta(days=298))] == ["j298", "j299"]
    if not is_mock(database):
        where = {"status": {"$in": ["succeeded", "failed"]}, "finished": {"$gte": begun + timedelta(days=298)}}
        plan = database["mt.jobs"].find(where).sort([("finished", 1), ("_id", 1)]).explain()
        assert plan["executionStats"]["totalDocsExamined"] == 2


def test_a_job_that_ended_badly_can_be_queued_again(jobs: Jobs) -> None:
    job_id = add(jobs, max_attempts=1)
    old = claim(jobs)["attempt"]
    assert not jobs.requeue(job_id)  # it runs
    jobs.fail(job_id, old, error=ERROR)

    assert jobs.requeue(job_id)

    attempt = claim(jobs)["attempt"]
    assert attempt == old + 1
    assert not jobs.holds(job_id, old)
    assert jobs.succeed(job_id, attempt, result="r")
    assert jobs.get(job_id)["error"] is None
    assert not jobs.requeue(job_id)


def test_waiting_ends_with_the_job(jobs: Jobs) -> None:
    job_id = add(jobs)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(jobs.wait, job_id, 60)
        attempt = claim(jobs)["attempt"]
        jobs.heartbeat(job_id, attempt, lease_s=60, progress={"step": 1})
        jobs.succeed(job_id, attempt, result="r")

        assert waiting.result(timeout=60)["result"] == "r"
    assert jobs.wait(job_id, 0)["status"] == "succeeded"


def test_a_job_that_ends_just_before_the_first_look_is_not_waited_for(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = add(jobs)
    attempt = claim(jobs)["attempt"]
    read = jobs.get

    def late(job_id: str) -> dict[str, Any]:
        jobs.succeed(job_id, attempt, result="r")
        return read(job_id)

    monkeypatch.setattr(jobs, "get", late)

    assert jobs.wait(job_id, 5)["status"] == "succeeded"


def test_waiting_has_an_end_and_the_job_goes_on(jobs: Jobs) -> None:
    job_id = add(jobs)

    with pytest.raises(JobTimeoutError, match="queued"):
        jobs.wait(job_id, 0.2)

    assert jobs.get(job_id)["status"] == "queued"


def test_two_databases_of_one_process_do_not_share_jobs() -> None:
    clients: list[Any] = [mongomock.MongoClient(), mongomock.MongoClient()]
    first, second = (Jobs(client.shop) for client in clients)
    add(first)

    assert second.find() == []
    for client in clients:
        client.close()
