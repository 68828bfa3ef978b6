"""The launcher of torch, with real processes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
from tests import processes_left as left
from tests.services.training.test_ranks import drivers

from mongotorch.errors import JobProcessError
from mongotorch.jobs.launchers import Launcher, launcher_named
from mongotorch.testing.launchers import ProcessLauncherSuite

pytestmark = pytest.mark.fault


class TestTorchrun(ProcessLauncherSuite):
    @pytest.fixture
    def launcher(self) -> Launcher:
        return launcher_named("torchrun")

    def test_nothing_is_left_behind_and_nothing_secret_is_shown(
        self,
        launcher: Launcher,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        request: pytest.FixtureRequest,
    ) -> None:
        own = Path(tempfile.mkdtemp(dir="/tmp", prefix="mt-"))  # a socket's path has at most 107 characters
        request.addfinalizer(lambda: shutil.rmtree(own))
        (ranks := tmp_path / "ranks").mkdir()
        monkeypatch.setenv("TMPDIR", str(own))
        monkeypatch.setattr("tempfile.tempdir", None)
        shown: list[str] = []

        def look() -> None:
            if len(list(ranks.iterdir())) < self.workers:
                return
            listed = subprocess.run(["ps", "axeww"], capture_output=True, text=True, check=True).stdout
            shown.append(listed)
            raise InterruptedError

        with pytest.raises(InterruptedError):
            self.run(launcher, "wait", ranks, look, secret="open-sesame")
        assert "drive_ranks" in shown[0]
        assert "open-sesame" not in shown[0]
        assert [
            path.name for path in own.iterdir() if "mongotorch" in path.name or "torchelastic" in path.name
        ] == []
        assert os.environ.get("RANK") is None

    def test_a_driver_that_is_killed_leaves_no_rank(self, launcher: Launcher, tmp_path: Path) -> None:
        ranks: list[int] = []

        def kill() -> None:
            if not ranks and len(list(tmp_path.iterdir())) == self.workers:
                ranks.extend(int(path.read_text()) for path in tmp_path.iterdir())
                (driver,) = drivers()
                os.kill(driver, signal.SIGKILL)

        with pytest.raises(JobProcessError, match="the process that watches the ranks was killed by SIGKILL"):
            self.run(launcher, "wait", tmp_path, kill)
        left.wait_for(lambda: not any(map(left.runs, ranks)), lambda: f"they still run: {ranks}")


RANKS = """
import sys
from mongotorch.cli.logs import logging_to_stderr
from mongotorch.jobs.launchers import RankCall, launcher_named
def launch():
    given = {"text": "mongodb://u:secret@h says"}
    call = RankCall(function="tests.jobs.launchers.test_torchrun:speak", arguments=given)
    launcher_named("torchrun").run(call, workers=2, resources={}, device="cpu", check=lambda: None)
if sys.argv[1] == "json":
    with logging_to_stderr("info", "json"):
        launch()
else:
    launch()
"""


def speak(text: str) -> None:
    """What a rank has to say, in the ways of libraries."""
    sys.stderr.write("0%\r50%\r100%\n\n" + "x" * 100_000 + "\n")
    logging.getLogger("pymongo").warning(text)
    warnings.warn("of torch", stacklevel=1)
    os.write(2, b"\xff no text\n")


@pytest.mark.parametrize("form", ["json", "none"])
def test_what_ranks_say_is_in_the_format_of_the_log(form: str) -> None:
    command = [sys.executable, "-c", RANKS, form]
    done = subprocess.run(command, capture_output=True, check=True, cwd=Path(__file__).parents[3], timeout=300)
    lines = done.stderr.decode(errors="replace").splitlines()
    if form == "none":  # a script that has set up no log reads what ranks print
        assert len([line for line in lines if line == "mongodb://u:secret@h says"]) == 2
        return
    messages = [json.loads(line)["message"] for line in lines]
    assert len([one for one in messages if "says" in one]) == 2
    assert len([one for one in messages if one == "100%"]) == 2
    assert any("of torch" in one for one in messages)
    assert any("no text" in one for one in messages)
    assert b"secret" not in done.stderr
