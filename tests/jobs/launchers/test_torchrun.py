"""The launcher of torch, with real processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

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
