"""`mongotorch demo`: the main job on real data, from documents to a prediction in another process."""

from __future__ import annotations

from mongotorch.demo.digits import DigitsNet, Outcome, accuracy, run_demo

__all__ = ["DigitsNet", "Outcome", "accuracy", "run_demo"]
