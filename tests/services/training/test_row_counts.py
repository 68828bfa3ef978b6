"""Rows are counted where they are read, whatever a collate_fn makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.helpers import fill, model, net, trainer
from torch import Tensor, nn

from mongotorch import Datalayer, Metric, TorchModel, Validation


class Forms(nn.Module):
    """The small net, on batches of any form."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x: Any) -> Any:
        if isinstance(x, list):
            x = torch.stack(x)
        elif x.shape[0] == 4:
            x = x.T.contiguous()
        return self.body(x)


def time_first(samples: list[Any]) -> Any:
    return torch.stack([x for x, _ in samples], dim=1), torch.tensor([y for _, y in samples])


def listed(samples: list[Any]) -> Any:
    return [x for x, _ in samples], torch.tensor([y for _, y in samples])


def stacked(samples: list[Any]) -> Any:
    return torch.stack([x for x, _ in samples]), torch.tensor([y for _, y in samples])


def share(output: Tensor, target: Tensor) -> float:
    return float((output.argmax(dim=1) == target).float().mean())


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("collate", [time_first, listed])
def test_means_and_progress_are_of_the_documents(db: Datalayer, uri: str, collate: Any, workers: int) -> None:
    if workers and uri.startswith("mongomock"):
        workers = 0  # its data is in one process only
    select = fill(db)
    values, samples = [], []
    for name, function in (("plain", stacked), ("other", collate)):
        checked = TorchModel(
            name, object=Forms(), validation=Validation("v", metrics=[Metric("share", object=share)])
        )
        job = db.apply(
            trainer(
                select,
                collate_fn=function,
                transform=lambda x, y: (torch.as_tensor(x, dtype=torch.float32), y),
                loader_kwargs={"batch_size": 9, "num_workers": workers},
                model=checked,
            ).replace(identifier=name)
        )
        values.append(job.result().trainer.metric_values)
        samples.append(job.progress["samples"])
    for name in ("objective", "share"):
        assert values[1][name] == pytest.approx(values[0][name], rel=1e-4)
    assert samples[0] == samples[1] > 12 * 6


def test_the_stream_counts_each_batch(db: Datalayer) -> None:
    fill(db)
    with db.stream(db["points"].find(), key=("x", "y"), batch_size=50) as stream:
        assert stream.batch_rows is None
        assert [stream.batch_rows for _ in stream] == [50, 50, 20]


def test_a_model_is_only_a_model() -> None:
    """What these tests lean on: the forms give the same output."""
    x = torch.randn(5, 4)
    forms = Forms()
    assert torch.equal(forms(list(x)), forms(x))
    assert torch.equal(forms(x.T), forms(x))
    assert model().object is not None
