"""Sets that are stored as what differs from an earlier one: read back exactly, small, and in few requests."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable

import numpy as np
import pytest

from mongotorch.data import Delta, Members, StoredMembers
from mongotorch.data.training_set import members as sets
from mongotorch.errors import DataError


def members(content: dict[int, int]) -> Members:
    """The set of these hashes of `_id`s, with the hashes of their fields."""
    rows = np.array(sorted(content.items()), np.uint64).reshape(-1, 2)
    digest = hashlib.sha256(rows.tobytes()).hexdigest()
    return Members(count=len(rows), digest=digest, rows=rows)


class Stored(dict[str, bytes]):
    """Blobs by name, and how often they were asked for."""

    requests = 0

    def get_many(self, names: Iterable[str]) -> list[tuple[str, bytes]]:
        self.requests += 1
        return [(name, self[name]) for name in names]

    def put(self, stored: StoredMembers) -> int:
        """Keep a set; how many bytes are new."""
        new = {name: blob for name, blob in stored.blobs.items() if name not in self}
        self.update(stored.blobs)
        return sum(map(len, new.values()))


def equal(first: Members, second: Members) -> bool:
    assert first.rows is not None
    assert second.rows is not None
    same = (first.count, first.digest) == (second.count, second.digest)
    return same and np.array_equal(first.rows, second.rows)


@pytest.mark.parametrize("seed", range(5))
def test_sets_that_change_little_are_small_and_come_back_exactly(seed: int) -> None:
    draw = random.Random(seed)
    content = {draw.getrandbits(64): draw.getrandbits(64) for _ in range(2000)}
    store, before, longest, nbytes = Stored(), None, 0, []
    versions: dict[str, Members] = {}
    for _ in range(150):
        for key in draw.sample(sorted(content), draw.randrange(3)):
            del content[key]
        for key in draw.sample(sorted(content), draw.randrange(3)):
            content[key] = draw.getrandbits(64)
        content |= {draw.getrandbits(64): draw.getrandbits(64) for _ in range(draw.randrange(6))}
        before = StoredMembers.made(members(dict(content)), before)
        nbytes.append(store.put(before))
        longest = max(longest, len(before.blobs))
        versions[before.name] = before.members
    for name, expected in versions.items():
        store.requests = 0
        read = StoredMembers.read(name, store.get_many)
        assert equal(read.members, expected)
        assert store.requests <= 2
        assert list(read.blobs)[-1] == read.name == name
        assert all(hashlib.sha256(blob).hexdigest() == each for each, blob in read.blobs.items())
    assert longest <= 1 + 7 * 3, "a set builds on few others"
    assert sum(nbytes[1:]) / len(nbytes) < 0.06 * nbytes[0], nbytes


def test_a_set_goes_on_after_it_was_read_as_if_it_had_been_kept() -> None:
    store, before = Stored(), None
    for count in range(1000, 1100):
        made = StoredMembers.made(members(dict.fromkeys(range(count), 1)), before)
        store.put(made)
        before = StoredMembers.read(made.name, store.get_many)
        assert list(before.blobs) == list(made.blobs)
        assert before.blobs == made.blobs


def test_the_same_set_is_stored_once() -> None:
    first = StoredMembers.made(members({1: 1, 2: 2}))
    again = StoredMembers.made(members({1: 1, 2: 2}), first)
    assert again.blobs == first.blobs
    assert first.name == hashlib.sha256(first.members.to_bytes()).hexdigest(), "as earlier releases named it"


@pytest.mark.parametrize(
    "after",
    [
        dict.fromkeys(range(100), 2),
        dict.fromkeys(range(1000, 1100), 1),
        dict.fromkeys(range(30), 1),
        {},
    ],
    ids=["all changed", "all others", "few left", "none"],
)
def test_a_set_that_changes_much_is_stored_whole(after: dict[int, int]) -> None:
    before = StoredMembers.made(members(dict.fromkeys(range(100), 1)))
    made = StoredMembers.made(members(after), before)
    assert len(made.blobs) == 1
    assert equal(StoredMembers.read(made.name, Stored(made.blobs).get_many).members, members(after))


@pytest.mark.parametrize("position", [0, 1, 3, 8, 9])
def test_a_set_with_an_id_several_times_is_stored_whole(position: int) -> None:
    before = StoredMembers.made(members(dict.fromkeys(range(100), 1)))
    for n in range(position):
        before = StoredMembers.made(members(dict.fromkeys(range(100), 1) | {0: n + 2}), before)
    assert len(before.blobs) > 1 or not position
    rows = np.array([[1, 1], [1, 2], *([key, 1] for key in range(2, 100))], np.uint64)
    twice = Members(count=len(rows), digest="ab" * 32, rows=rows)
    made = StoredMembers.made(twice, before)
    assert len(made.blobs) == 1
    after = StoredMembers.made(members(dict.fromkeys(range(101), 1)), made)
    assert len(after.blobs) == 1


def test_what_earlier_releases_stored_is_read() -> None:
    whole = members({key: key for key in range(50)})
    blob = whole.to_bytes()
    name = hashlib.sha256(blob).hexdigest()
    assert equal(StoredMembers.read(name, Stored({name: blob}).get_many).members, whole)
    assert Delta.look_up(blob, 7) == (True, None)
    assert Delta.look_up(blob, 50) == (False, None)


def test_a_delta_is_asked_for_a_document_that_it_adds_removes_or_does_not_name() -> None:
    first = StoredMembers.made(members(dict.fromkeys(range(1000), 1)))
    second = StoredMembers.made(members(dict.fromkeys(range(3, 1003), 1)), first)
    third = StoredMembers.made(members(dict.fromkeys(range(4, 1003), 1) | {5: 2}), second)
    assert Delta.look_up(first.blobs[first.name], 2) == (True, None)
    assert Delta.look_up(first.blobs[first.name], 1001) == (False, None)
    blob = third.blobs[third.name]
    before = Delta.from_bytes(blob).ancestors[-1]
    for key, found in ((3, False), (5, True), (6, None), (2**63 + 1, None)):
        assert Delta.look_up(blob, key) == (found, before)
    assert Delta.look_up(second.blobs[second.name], 1001) == (True, first.name)
    assert Delta.look_up(second.blobs[second.name], 2) == (False, first.name)


@pytest.mark.parametrize("key", [2, 500])
@pytest.mark.parametrize("cut", [0, 7, 30, 60, 90])
def test_a_blob_that_is_cut_cannot_be_asked(cut: int, key: int) -> None:
    before = StoredMembers.made(members(dict.fromkeys(range(1000), 1)))
    made = StoredMembers.made(members(dict.fromkeys(range(3, 1003), 1)), before)
    with pytest.raises(DataError):
        Delta.look_up(made.blobs[made.name][:cut], key)


@pytest.mark.parametrize("cut", [0, 7, 30, 60, 90, -1, -8])
def test_a_blob_that_is_cut_is_refused(cut: int) -> None:
    before = StoredMembers.made(members(dict.fromkeys(range(1000), 1)))
    made = StoredMembers.made(members(dict.fromkeys(range(3, 1003), 1)), before)
    blob = made.blobs[made.name]
    assert Delta.from_bytes(blob).removed.tolist() == [0, 1, 2]
    damaged = {**made.blobs, made.name: blob[:cut]}
    with pytest.raises(DataError):
        StoredMembers.read(made.name, Stored(damaged).get_many)


def test_a_chain_that_gives_another_number_of_documents_is_refused() -> None:
    before = StoredMembers.made(members(dict.fromkeys(range(1000), 1)))
    made = StoredMembers.made(members(dict.fromkeys(range(1001), 1)), before)
    other = StoredMembers.made(members(dict.fromkeys(range(999), 1)))
    swapped = {before.name: other.blobs[other.name], made.name: made.blobs[made.name]}
    with pytest.raises(DataError, match="1001 documents came out as one of 1000"):
        StoredMembers.read(made.name, Stored(swapped).get_many)


@pytest.mark.parametrize("seed", range(20))
def test_a_set_that_is_compared_in_parts_is_stored_as_one_that_is_not(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    most = 2 ** draw.choice([6, 64])  # the hashes of a part may lie close together, or begin with the bounds
    first = {draw.randrange(most): draw.randrange(3) for _ in range(draw.randrange(1, 300))}
    second = {key: draw.randrange(3) if draw.random() < 0.1 else value for key, value in first.items()}
    second = {key: value for key, value in second.items() if draw.random() < 0.9}
    second |= {draw.randrange(most): draw.randrange(3) for _ in range(draw.randrange(20))}
    stored = StoredMembers.made(members(first))
    expected = StoredMembers.made(members(second), stored)
    monkeypatch.setattr(sets, "_COMPARED", draw.randrange(1, 40))
    assert dict(StoredMembers.made(members(second), stored).blobs) == dict(expected.blobs)
    assert equal(
        StoredMembers.read(expected.name, lambda names: [(n, expected.blobs[n]) for n in names]).members,
        members(second),
    )
