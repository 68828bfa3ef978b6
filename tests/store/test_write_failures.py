"""A collection, an upload and a checkpoint die at each of their writes, before it and after it, on both backends.

Always: what was visible loads, and the next collection leaves nothing over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mongotorch.store import BlobStore, Checkpoints, Components, GarbageCollector, Jobs
from mongotorch.store.blobs import CHUNK_BYTES

pytestmark = pytest.mark.fault

WRITES = (
    *("insert_one", "insert_many", "update_one", "update_many", "replace_one", "delete_one", "delete_many"),
    *("find_one_and_update", "find_one_and_delete", "find_one_and_replace", "bulk_write"),
)


class KilledError(BaseException):
    """No code may catch it, as none can catch SIGKILL."""


def mortal(room: Any, patch: pytest.MonkeyPatch, kill_at: int, *, after: bool) -> None:
    """Count every write of a room, and end it at the n-th, before or after it reached the database."""
    count = iter(range(10**6))
    for part in vars(room).values():
        if isinstance(part, BlobStore):
            _patch_collections(part, patch, count, kill_at, after)
    _patch_collections(room, patch, count, kill_at, after)


def _patch_collections(room: Any, patch: pytest.MonkeyPatch, count: Any, kill_at: int, after: bool) -> None:
    for part in vars(room).values():
        if hasattr(part, "insert_one") and hasattr(part, "find"):
            for method in WRITES:
                patch.setattr(part, method, _killing(getattr(part, method), count, kill_at, after))


def _killing(write: Any, count: Any, kill_at: int, after: bool) -> Any:
    def killing(*args: Any, **kwargs: Any) -> Any:
        mine = next(count)
        if mine == kill_at and not after:
            raise KilledError
        result = write(*args, **kwargs)
        if mine == kill_at:
            raise KilledError
        return result

    return killing


def at_every_write(prepare: Callable[[], Any], act: Callable[[Any], Any], check: Callable[[], Any]) -> int:
    """Kill `act` at each of its writes in turn, and check what is left each time; how many writes it has."""
    kill_at = 0
    while True:
        for after in (False, True):
            room = prepare()
            with pytest.MonkeyPatch.context() as patch:
                mortal(room, patch, kill_at, after=after)
                try:
                    act(room)
                except KilledError:
                    killed = True
                else:
                    killed = False
            check()
        if not killed:
            return kill_at
        kill_at += 1


class House:
    def __init__(self, database: Any) -> None:
        self.database = database
        self.blobs, self.components = BlobStore(database), Components(database)
        self.jobs = Jobs(database)
        for room in (self.blobs, self.components, self.jobs, Checkpoints(database)):
            room.ensure_indexes()
        self.kept = self.blobs.put(b"kept" * CHUNK_BYTES)
        self.publish("kept", self.kept)
        self.runs = 0

    def publish(self, uuid: str, *blobs: str, **more: Any) -> None:
        names = {"type_id": "model", "identifier": uuid, "digest": "d", "refs": []}
        self.components.publish({"_id": uuid, **names, "blobs": list(blobs), **more})

    def run(self) -> tuple[str, int]:
        self.runs += 1
        job, _ = self.jobs.add(component=f"c{self.runs}", type_id="trainer", identifier="t")
        claimed = self.jobs.claim(worker="w", lease_s=600, job_id=job)
        assert claimed is not None
        return job, claimed["attempt"]

    def nothing_is_left_but_what_is_kept(self) -> None:
        GarbageCollector(self.database, grace_s=0).collect()
        count = {name: self.database[name].count_documents({}) for name in self.database.list_collection_names()}
        assert count.get("mt.artifacts.files") == 1
        assert count.get("mt.artifacts.chunks") == 4
        assert count.get("mt.components") == 1
        assert count.get("mt.checkpoints", 0) == 0
        assert count.get("mt.garbage", 0) == 0
        assert self.blobs.get(self.kept) == b"kept" * CHUNK_BYTES
        assert self.components.get("kept")["blobs"] == [self.kept]


@pytest.fixture
def house(database: Any) -> House:
    return House(database)


def test_a_collection_that_dies_at_any_write_leaves_what_the_next_one_collects(house: House) -> None:
    def litter() -> GarbageCollector:
        job, attempt = house.run()
        Checkpoints(house.database).put(job, attempt, 1, {}, [house.blobs.put(b"state")])
        house.publish("half", house.blobs.put(b"half"), anchor="nothing")
        house.blobs.put(b"unused" * CHUNK_BYTES)
        house.database["mt.artifacts.chunks"].insert_one({"files_id": "dead", "n": 0, "data": b"x"})
        house.jobs.cancel(job)
        return GarbageCollector(house.database, grace_s=0)

    writes = at_every_write(litter, lambda garbage: garbage.collect(), house.nothing_is_left_but_what_is_kept)

    assert writes >= 10


def test_an_upload_that_dies_at_any_write_leaves_nothing_after_a_collection(house: House) -> None:
    data = b"new" * CHUNK_BYTES

    def put_again_and_check() -> None:
        name = house.blobs.put(data)
        assert house.blobs.get(name) == data
        house.nothing_is_left_but_what_is_kept()

    writes = at_every_write(lambda: BlobStore(house.database), lambda blobs: blobs.put(data), put_again_and_check)

    assert writes >= 3


def test_a_checkpoint_that_dies_at_any_write_leaves_the_one_before(house: House) -> None:
    steps = iter(range(1, 10**6))
    state: dict[str, Any] = {}

    def prepare() -> Checkpoints:
        state["job"], state["attempt"] = house.run()
        checkpoints = Checkpoints(house.database)
        for _ in range(2):
            write(checkpoints)
        return Checkpoints(house.database)

    def write(checkpoints: Checkpoints) -> None:
        step = next(steps)
        blob = house.blobs.put(f"state {step}".encode())
        checkpoints.put(state["job"], state["attempt"], step, {"step": step}, [blob])
        state["last"] = step

    def check() -> None:
        newest = Checkpoints(house.database).newest(state["job"])
        assert newest is not None
        assert newest["step"] in (state["last"], state["last"] + 1)
        assert house.blobs.get(newest["blobs"][0]) == f"state {newest['step']}".encode()
        GarbageCollector(house.database, grace_s=0).collect()
        assert house.blobs.has(newest["blobs"][0])  # the job still runs
        house.jobs.cancel(state["job"])
        house.nothing_is_left_but_what_is_kept()

    assert at_every_write(prepare, write, check) >= 2
