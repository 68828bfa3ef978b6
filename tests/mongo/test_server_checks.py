"""What is said of a server: its version and known holes, its replica set, its disk."""

from __future__ import annotations

from pathlib import Path

from mongotorch.mongo.connection import open_address
from mongotorch.mongo.server_checks import check_server
from mongotorch.settings import read_settings


def test_a_hole_is_named_only_where_it_is_open(mongod: str, tmp_path: Path) -> None:
    states = {}
    for uri in (f"mongodb://{mongod}/checks?replicaSet=rs0", f"embedded:{tmp_path / 'db'}"):
        with open_address(uri, read_settings()) as connection:
            checks = {check.name: check for check in check_server(connection)}
        states[uri.partition(":")[0]] = checks

    assert states["mongodb"]["version"].state == "warning"  # MongoDB 6.0.5, which takes zlib
    assert "CVE-2025-14847" in states["mongodb"]["version"].text
    assert states["embedded"]["version"].state == "ok"  # the same release, started without zlib
    assert states["mongodb"]["permissions"].state == "warning"  # nobody is authenticated
    assert states["embedded"]["permissions"].state == "ok"


def test_a_single_server_is_a_warning(uri: str) -> None:
    with open_address(uri, read_settings()) as connection:
        checks = {check.name: check for check in check_server(connection)}

    if uri.startswith("mongomock:"):
        assert checks["server"].state == "warning"
    else:
        assert checks["replica set"].state == "ok"
        assert not {check.state for check in checks.values()} & {"problem", "unknown"}
