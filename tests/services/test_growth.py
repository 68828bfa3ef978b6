"""A year of hourly versions: what their sets of documents take, and how long asking about one document takes."""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from tests.helpers import COLLECTION, fill, trainer

from mongotorch import Datalayer
from mongotorch.data import Members, StoredMembers, id_key

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
NEW = 100  # documents a version


@pytest.mark.parametrize(("documents", "versions"), [(20_000, 2_000), (1_000_000, 100)])
def test_thousands_of_versions_are_small_and_asked_in_a_second(
    server_uri: str, tmp_path: Path, documents: int, versions: int
) -> None:
    draw = np.random.default_rng(0)
    with Datalayer.connect(server_uri, cache_dir=tmp_path, progress=False, valid_fraction=0.2) as db:
        trained = db.apply(trainer(fill(db), max_iterations=1, validation_interval=None)).result()
        published = db["mt.components"].raw.find_one({"_id": trained.uuid})
        assert published is not None
        blobs, before, nbytes = db._services.catalog.blobs, None, 0
        rows = np.unique(draw.integers(0, 2**63, (documents, 2), np.uint64), axis=0)
        asked, known = id_key("the one"), []
        for version in range(2, versions + 2):
            fresh = draw.integers(0, 2**63, (NEW, 2), np.uint64)
            if version == versions // 2:
                fresh[0] = asked, 1
            kept = np.delete(rows, draw.integers(0, len(rows), NEW), axis=0)
            rows = np.concatenate([kept, fresh])
            rows = rows[np.argsort(rows[:, 0], kind="stable")]
            made = StoredMembers.made(Members(count=len(rows), digest=f"{version:064x}", rows=rows), before)
            for name, blob in made.blobs.items():
                if before is None or name not in before.blobs:
                    blobs.put(blob)
                    nbytes += len(blob)
            before = made
            data = {**published["data"], "members": made.name, "train": {"count": len(rows), "digest": made.name}}
            record = {"_id": f"v{version}", "version": version, "data": data, "blobs": sorted(made.blobs)}
            created = datetime(2026, 1, 1) + timedelta(hours=version)
            db["mt.components"].raw.insert_one({**published, **record, "job": f"j{version}", "created": created})
            at = np.searchsorted(rows[:, 0], asked)
            if at < len(rows) and rows[at, 0] == asked:
                known.append(version)
        took = []
        for _ in range(5):
            began = time.monotonic()
            found = db.trained_on("the one", collection=COLLECTION)
            took.append(time.monotonic() - began)
        began = time.monotonic()
        db.load("model", "m", 1)
        loaded = time.monotonic() - began
        began = time.monotonic()
        assert before is not None
        assert StoredMembers.read(before.name, blobs.get_many).members.count == len(rows)
        read = time.monotonic() - began
    assert sorted(one.version for one in found) == known
    whole = 16 * documents * versions
    print(f"{versions:,} versions of {documents:,} documents: {nbytes / 1e6:,.0f} MB, not {whole / 1e6:,.0f}")
    print(f"trained_on {min(took):.2f} s, a set {read:.2f} s, load {loaded:.2f} s")
    assert nbytes < 0.1 * whole
    assert min(took) < 1.0, took
    assert loaded < 1.0
