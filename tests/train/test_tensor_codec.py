"""Modules and states come back bit for bit, with what was tied still tied and nothing else."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tests.helpers import Blobs
from torch import nn

from mongotorch.codecs import Codecs
from mongotorch.errors import CodecError
from mongotorch.train.tensor_codec import TorchCodec, fill_module


def through(value: Any) -> tuple[Any, dict[str, Any], Blobs]:
    codecs, blobs = Codecs.builtin(TorchCodec()), Blobs()
    record = codecs.encode(value, blobs.put)
    return codecs.decode(record, blobs.blob), record, blobs


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3),
        torch.arange(6.0).reshape(2, 3).T,
        torch.tensor(3.5, dtype=torch.bfloat16),
        torch.zeros(0, 4),
        torch.tensor([True, False]),
        torch.ones(2, 3, 4, 5, dtype=torch.float16).to(memory_format=torch.channels_last),
        torch.tensor([1 + 2j]),
        torch.ones(3, requires_grad=True),
        torch.ones(1).expand(4),
        torch.eye(3).to_sparse(),
    ],
)
def test_a_tensor_comes_back_bit_for_bit(tensor: torch.Tensor) -> None:
    again, record, _ = through(tensor)

    assert record["_codec"] == "torch"
    assert torch.equal(again.to_dense(), tensor.to_dense())
    assert (again.dtype, again.shape, again.requires_grad) == (tensor.dtype, tensor.shape, tensor.requires_grad)


def test_a_module_comes_back_with_its_names_and_no_tensor_in_the_pickle() -> None:
    net = nn.Sequential(nn.Linear(100, 100), nn.BatchNorm1d(100))

    again, record, blobs = through(net)

    assert all(
        torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert {t["name"] for t in record["tensors"]} == set(net.state_dict())
    assert len(blobs[record["skeleton"]]) < 4000
    assert isinstance(next(again.parameters()), nn.Parameter)


def test_tied_weights_stay_tied_and_equal_ones_stay_apart() -> None:
    net: Any = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)])
    with torch.no_grad():
        net[2].weight.copy_(net[0].weight)
    net[1].weight = net[0].weight

    again, _, _ = through(net)

    assert again[0].weight is again[1].weight
    assert again[2].weight is not again[0].weight
    with torch.no_grad():
        again[0].weight.add_(1)
    assert torch.equal(again[2].weight, net[0].weight)


def test_views_of_one_storage_stay_views_and_a_lone_slice_takes_only_its_own() -> None:
    whole = torch.arange(1000.0)

    again, _, _ = through({"whole": whole, "tail": whole[990:]})
    _, record, _ = through({"tail": whole[990:]})

    again["whole"][995] = -1
    assert again["tail"][5] == -1
    assert [s["nbytes"] for s in record["storages"]] == [40]


def test_a_fine_tuned_head_shares_the_blobs_of_the_body() -> None:
    net: Any = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    _, _, before = through(net)
    with torch.no_grad():
        net[1].weight.add_(1)

    _, _, after = through(net)

    assert len(set(after) - set(before)) == 1


def test_the_state_of_an_optimizer_comes_back() -> None:
    net = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(2, 3)).sum().backward()
    optimizer.step()

    again, _, _ = through(optimizer.state_dict())

    assert again["param_groups"] == optimizer.state_dict()["param_groups"]
    assert torch.equal(again["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert float(again["state"][0]["step"]) == 1.0


def test_a_module_given_as_code_gets_the_weights_and_nothing_is_unpickled() -> None:
    net = nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40))
    _, record, blobs = through(net)
    del blobs[record["skeleton"]]  # so that reading the pickle would fail
    other = nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40))
    fill_module(other, record, blobs.blob)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in other.state_dict().items())
    with pytest.raises(CodecError, match=r"0\.weight"):
        fill_module(nn.Sequential(nn.Linear(40, 41), nn.BatchNorm1d(41)), record, blobs.blob)


def weighted(weight: torch.Tensor) -> Any:
    """A loss that holds a tensor in its closure."""
    return lambda output, target: nn.functional.cross_entropy(output, target, weight=weight)


@pytest.mark.parametrize(
    "make",
    [
        lambda: functools.partial(nn.functional.cross_entropy, weight=torch.tensor([1.0, 2.0, 3.0])),
        lambda: weighted(torch.tensor([1.0, 2.0, 3.0])),
        lambda: functools.partial(weighted(torch.tensor([1.0, 2.0, 3.0]))),
    ],
)
def test_a_function_that_holds_a_tensor_is_recognised_and_comes_back(make: Any) -> None:
    kept = [make() for _ in range(3)]  # alive together: each has an address of its own
    records = [through(one)[1] for one in kept]

    assert records[0]["_codec"] == "torch"
    assert records[0] == records[1] == records[2]
    again, _, _ = through(kept[0])
    assert records[0] == through(again)[1]
    output, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    assert torch.equal(again(output, target), kept[0](output, target))
