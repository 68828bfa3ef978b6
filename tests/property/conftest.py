"""Hypothesis without a deadline: how long an example takes says nothing on a machine that is shared."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("mongotorch", deadline=None)
settings.load_profile("mongotorch")
