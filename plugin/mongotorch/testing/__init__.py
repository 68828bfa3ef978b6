"""Test suites to inherit: what every codec, compute engine, launcher, database and trigger has to do.

A suite asks for its subject by fixtures that the inheriting class defines, and opens nothing itself. Importing it
needs pytest; `mongotorch` itself never imports it.
"""

from __future__ import annotations

import pytest

# Before the suites are imported: else a failing `assert` in them would not say what it compared.
_SUITES = ("codecs", "engines", "launchers", "stores", "triggers")
pytest.register_assert_rewrite(*(f"{__name__}.{part}" for part in _SUITES))

from mongotorch.testing.codecs import CodecSuite  # noqa: E402
from mongotorch.testing.engines import EngineSuite, WaitingEngineSuite  # noqa: E402
from mongotorch.testing.launchers import LauncherSuite, ProcessLauncherSuite  # noqa: E402
from mongotorch.testing.stores import StoreSuite, Thing  # noqa: E402
from mongotorch.testing.triggers import TriggerSuite  # noqa: E402

__all__ = [
    "CodecSuite",
    "EngineSuite",
    "LauncherSuite",
    "ProcessLauncherSuite",
    "StoreSuite",
    "Thing",
    "TriggerSuite",
    "WaitingEngineSuite",
]
