"""docker/: no engine runs in the tests, so the files are linted, validated and read."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "docker" / "compose.yaml"
DOCKERFILE = ROOT / "docker" / "Dockerfile"


@pytest.fixture(scope="module")
def compose() -> Any:
    return YAML(typ="safe").load(COMPOSE)


def _run(tool: str, *arguments: str) -> None:
    program = str(Path(sys.executable).with_name(tool))
    ran = subprocess.run([program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    _run("hadolint", "docker/Dockerfile")


def test_compose_file_follows_the_compose_specification() -> None:
    _run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker/compose.yaml")


def test_mongod_is_a_replica_set_with_authentication(compose: Any) -> None:
    mongo = compose["services"]["mongo"]
    command = mongo["command"]
    assert command[command.index("--replSet") + 1] == "rs0"
    keyfile = command[command.index("--keyFile") + 1]
    assert any(volume == f"mongo-key:{Path(keyfile).parent}:ro" for volume in mongo["volumes"])
    assert mongo["depends_on"]["keyfile"]["condition"] == "service_completed_successfully"
    assert {"MONGO_INITDB_ROOT_USERNAME", "MONGO_INITDB_ROOT_PASSWORD"} <= set(mongo["environment"])


def test_data_is_in_a_named_volume(compose: Any) -> None:
    assert "mongo-data" in compose["volumes"]
    assert "mongo-data:/data/db" in compose["services"]["mongo"]["volumes"]


def test_healthy_means_initiated_and_primary(compose: Any) -> None:
    mongo = compose["services"]["mongo"]
    script = next(part for part in mongo["healthcheck"]["test"] if part.endswith(".js"))
    assert f"./{Path(script).name}:{script}:ro" in mongo["volumes"]
    source = (COMPOSE.parent / Path(script).name).read_text(encoding="utf-8")
    assert "rs.initiate(" in source
    assert '_id: "rs0"' in source
    assert "quit(db.hello().isWritablePrimary ? 0 : 1)" in source


def test_command_waits_for_a_healthy_server(compose: Any) -> None:
    assert compose["services"]["mongotorch"]["depends_on"]["mongo"]["condition"] == "service_healthy"


def test_no_password_is_written_down_and_none_is_assumed() -> None:
    text = COMPOSE.read_text(encoding="utf-8")
    uses = re.findall(r"\$\{MONGO_PASSWORD[^}]*\}", text)
    assert len(uses) == 2
    assert all(use.startswith("${MONGO_PASSWORD:?") for use in uses)
    for line in text.splitlines():
        if re.search(r"PASSWORD:\s|://", line) and not line.lstrip().startswith("#"):
            assert "${MONGO_PASSWORD:?" in line


def test_server_is_published_on_this_machine_only(compose: Any) -> None:
    assert compose["services"]["mongo"]["ports"] == ["127.0.0.1:27017:27017"]


def test_images_are_pinned(compose: Any) -> None:
    images = {compose["services"][name]["image"] for name in ("mongo", "keyfile")}
    assert len(images) == 1
    assert re.fullmatch(r"mongo:\d+\.\d+(\.\d+)?", images.pop())
    base = re.search(r"^FROM (\S+)$", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)
    assert base is not None
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base[1])


def test_image_runs_without_rights() -> None:
    users = re.findall(r"^USER (\S+)$", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)
    assert users
    assert users[-1] not in {"0", "root"}
