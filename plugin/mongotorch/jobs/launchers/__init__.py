"""Launchers: how the ranks of one run are started, watched and ended."""

from mongotorch.jobs.launchers.base import Launcher, LocalLauncher, RankCall, is_launcher, launcher_named

__all__ = ["Launcher", "LocalLauncher", "RankCall", "is_launcher", "launcher_named"]
