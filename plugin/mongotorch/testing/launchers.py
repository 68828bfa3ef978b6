"""The tests of a launcher, for a class to inherit. They need no database."""

# ruff: noqa: S101 - these are tests

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mongotorch.errors import JobProcessError, ShapeError
from mongotorch.jobs.launchers import Launcher, RankCall, launcher_named

_DEADLINE_S = 120.0  # on a machine that does other things as well


class LauncherSuite:
    """The tests of any launcher: a class that inherits it, called `Test…`, defines the fixture `launcher`."""

    workers = 1
    """How many ranks the tests run."""

    @pytest.fixture
    def launcher(self) -> Launcher:
        """The launcher."""
        raise NotImplementedError("define the fixture `launcher`")

    def run(
        self,
        launcher: Launcher,
        name: str,
        folder: Path,
        check: Callable[[], None] = lambda: None,
        **given: object,
    ) -> None:
        """Run a function of this module on all ranks.

        Args:
            launcher: The launcher.
            name: The function.
            folder: Its first argument.
            check: As for `Launcher.run`.
            given: Its other arguments.
        """
        call = RankCall(function=f"{__name__}:{name}", arguments={"folder": str(folder), **given})
        launcher.run(call, workers=self.workers, resources={}, device="cpu", check=check)

    def test_the_setting_launcher_finds_it_by_its_name(self, launcher: Launcher) -> None:
        """Built in, or by an entry point."""
        assert type(launcher_named(launcher.name)) is type(launcher)

    def test_every_rank_calls_the_function_once(self, launcher: Launcher, tmp_path: Path) -> None:
        """With what it was given, and the environment of `torch.distributed`."""
        self.run(launcher, "count", tmp_path, word="hello")

        expected = {f"{rank}": f"{rank} of {self.workers}: hello\n" for rank in range(self.workers)}
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == expected

    def test_what_a_rank_raises_is_raised_with_its_class_text_and_details(
        self, launcher: Launcher, tmp_path: Path
    ) -> None:
        """The one that raises first, whatever becomes of the others."""
        with pytest.raises(ShapeError, match="row 7 has another shape") as raised:
            self.run(launcher, "refuse", tmp_path, rank=self.workers - 1)

        assert (raised.value.document_id, raised.value.field) == (7, "x")
        _expect_gone(tmp_path)

    def test_a_check_that_raises_ends_all_ranks(self, launcher: Launcher, tmp_path: Path) -> None:
        """And is raised as it is; with one rank in the calling process before it begins."""

        def check() -> None:
            if self.workers == 1 or len(list(tmp_path.iterdir())) == self.workers:
                raise KeyError("cancelled")

        with pytest.raises(KeyError, match="cancelled"):
            self.run(launcher, "wait", tmp_path, check)

        _expect_gone(tmp_path)


class ProcessLauncherSuite(LauncherSuite):
    """The tests of a launcher that starts processes on this machine."""

    workers = 2

    def test_a_rank_that_is_killed_ends_the_others(self, launcher: Launcher, tmp_path: Path) -> None:
        """Within seconds, with an error that says which it was."""
        begun_s: list[float] = []

        def kill() -> None:
            if not begun_s and len(list(tmp_path.iterdir())) == self.workers:
                os.kill(int((tmp_path / "1").read_text()), signal.SIGKILL)
                begun_s.append(time.monotonic())

        with pytest.raises(JobProcessError, match="rank 1 of 2 was killed by SIGKILL"):
            self.run(launcher, "wait", tmp_path, kill)

        assert time.monotonic() - begun_s[0] < 20
        _expect_gone(tmp_path)

    def test_ranks_end_with_the_process_that_launched_them(self, launcher: Launcher, tmp_path: Path) -> None:
        """Although it is killed, and cannot end them."""
        code = f"from {__name__} import launch; launch({launcher.name!r}, {self.workers}, {str(tmp_path)!r})"
        with subprocess.Popen([sys.executable, "-c", code]) as process:  # noqa: S603
            try:
                _wait_for(lambda: len(list(tmp_path.iterdir())) == self.workers)
            finally:
                process.kill()
        _expect_gone(tmp_path)


def launch(name: str, workers: int, folder: str) -> None:
    """Launch ranks that wait."""
    call = RankCall(function=f"{__name__}:wait", arguments={"folder": folder})
    launcher_named(name).run(call, workers=workers, resources={}, device="cpu", check=lambda: None)


def count(folder: str, word: str) -> None:
    """Write which rank this is."""
    path = Path(folder) / _rank()
    with path.open("a") as file:
        file.write(f"{_rank()} of {os.environ.get('WORLD_SIZE', '1')}: {word}\n")


def refuse(folder: str, rank: int) -> None:
    """Raise on one rank, and wait for ever on the others."""
    if _rank() == str(rank):
        raise ShapeError("row 7 has another shape", document_id=7, field="x")
    wait(folder)


def wait(folder: str, secret: str = "") -> None:  # noqa: ARG001
    """Write the number of this process, and wait for ever."""
    (Path(folder) / f".{_rank()}").write_text(str(os.getpid()))
    (Path(folder) / f".{_rank()}").rename(Path(folder) / _rank())
    time.sleep(3600)


def _rank() -> str:
    return os.environ.get("RANK", "0")


def _expect_gone(folder: Path) -> None:
    for path in folder.iterdir():
        pid = int(path.read_text())
        _wait_for(lambda pid=pid: not _is_alive(pid))  # type: ignore[misc]


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # a child of a process that does not wait for its children


def _wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)
