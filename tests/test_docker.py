"""docker/: no engine runs here. The files are linted, validated and read, and what containers run is run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
COMPOSE = DOCKER / "compose.yaml"
DOCKERFILE = DOCKER / "Dockerfile"
OURS = ("initialise", "worker", "dashboard", "mongotorch")


@pytest.fixture(scope="module")
def compose() -> Any:
    return YAML(typ="safe").load(COMPOSE)


def _run(tool: str, *arguments: str) -> None:
    program = str(Path(sys.executable).with_name(tool))
    ran = subprocess.run([program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


# What is written in the files.


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
    assert {"MONGO_INITDB_ROOT_USERNAME", "MONGO_INITDB_ROOT_PASSWORD_FILE"} <= set(mongo["environment"])


def test_data_is_in_a_named_volume(compose: Any) -> None:
    assert "mongo-data" in compose["volumes"]
    assert "mongo-data:/data/db" in compose["services"]["mongo"]["volumes"]


def test_the_member_is_reached_by_the_name_of_its_service(compose: Any) -> None:
    assert compose["services"]["initialise"]["environment"]["MONGO_MEMBER"] == "mongo:27017"
    assert not any("network_mode" in compose["services"][name] for name in ("mongo", *OURS))


def test_each_service_waits_for_what_it_needs(compose: Any) -> None:
    services = compose["services"]
    assert services["initialise"]["depends_on"]["mongo"]["condition"] == "service_healthy"
    for name in ("worker", "dashboard", "mongotorch"):
        assert services[name]["depends_on"]["initialise"]["condition"] == "service_completed_successfully"


def test_secrets_are_files_and_nobody_gets_more_than_it_needs(compose: Any) -> None:
    services, secrets = compose["services"], compose["secrets"]
    for service in services.values():
        assert set(service.get("secrets", [])) <= set(secrets)
        for name, value in service.get("environment", {}).items():
            assert "PASSWORD" not in name or name.endswith("_FILE")
            assert "://" not in str(value)
    assert services["worker"]["secrets"] == ["worker_uri"]
    assert services["mongotorch"]["secrets"] == ["trainer_uri"]
    assert services["dashboard"]["secrets"] == ["reader_uri", "dashboard_token"]
    assert "docker/secrets/" in (ROOT / ".gitignore").read_text("utf-8").splitlines()
    assert "docker/secrets" not in (ROOT / ".dockerignore").read_text("utf-8")  # only what is named gets in
    assert (ROOT / ".dockerignore").read_text("utf-8").startswith("*\n")


def test_server_is_published_on_this_machine_only(compose: Any) -> None:
    for name in ("mongo", "dashboard"):
        assert [port.partition(":")[0] for port in compose["services"][name]["ports"]] == ["127.0.0.1"]
    assert not any("ports" in compose["services"][name] for name in {*OURS} - {"dashboard"})


def test_memory_is_bounded_everywhere_and_above_the_cache(compose: Any) -> None:
    services = compose["services"]
    assert all("mem_limit" in services[name] for name in ("mongo", *OURS))
    assert services["mongo"]["command"][-2:] == ["--wiredTigerCacheSizeGB", "${MONGO_CACHE_GB:-1}"]
    assert services["mongo"]["mem_limit"] == "${MONGO_MEMORY:-3g}"


def test_our_containers_have_no_rights_and_time_to_stop(compose: Any) -> None:
    for name in OURS:
        service = compose["services"][name]
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["init"]
    assert compose["services"]["worker"]["stop_grace_period"] == "60s"


def test_images_are_pinned_and_the_server_has_no_known_hole(compose: Any) -> None:
    images = {compose["services"][name]["image"] for name in ("mongo", "keyfile")}
    assert len(images) == 1
    found = re.fullmatch(r"mongo:(\d+)\.(\d+)\.(\d+)", images.pop())
    assert found is not None
    assert tuple(map(int, found.groups())) >= (7, 0, 28)
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE.read_text("utf-8"), re.MULTILINE)
    assert len(bases) == 2
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", bases[0])


def test_image_runs_without_rights_with_the_cpu_build_of_torch() -> None:
    text = DOCKERFILE.read_text("utf-8")
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] not in {"0", "root"}
    assert 'ARG TORCH_INDEX_URL="https://download.pytorch.org/whl/cpu"' in text
    labels = set(re.findall(r"org\.opencontainers\.image\.(\w+)=", text))
    assert {"title", "description", "source", "licenses", "version", "revision"} <= labels


def test_what_the_dockerfile_copies_is_there_and_let_in() -> None:
    let_in = {
        line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")
    }
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE.read_text("utf-8"), re.MULTILINE)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists()
        assert name in let_in
