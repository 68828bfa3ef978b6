"""Mirrors: processes that pass on what runs measure to TensorBoard, MLflow, Weights & Biases or a webhook."""

from mongotorch.mirrors.base import MetricMirror, Mirror, MirroredRun, Mirroring, open_mirror

__all__ = ["MetricMirror", "Mirror", "MirroredRun", "Mirroring", "open_mirror"]
