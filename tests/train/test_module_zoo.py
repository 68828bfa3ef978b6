"""Modules as people have them: stored, loaded by another pickle of the same process, and equal in what they do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from tests.helpers import Blobs, seeded
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from mongotorch.codecs import Codecs
from mongotorch.errors import CodecError
from mongotorch.train.tensor_codec import TorchCodec

X = torch.linspace(-1, 1, 32).reshape(8, 4)


class KeepsOutput(nn.Module):
    """Remembers what it computed last, with its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.last: Any = None
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        self.last = self.body(x)
        self.seen = [self.last, self.last.relu()]
        return self.last


class Rotary(nn.Module):
    """Grows a cache that is in no state dict."""

    cached: Any

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.register_buffer("cached", torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Any:
        if len(self.cached) < len(x):
            self.cached = torch.arange(len(x), dtype=torch.float32).cos()[:, None]
        return self.body(x) * self.cached[: len(x)]


class Counting(nn.Module):
    """Has state of its own kind."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls = nn.Linear(4, 3), 0

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.body(x)


class Lora(nn.Module):
    """A frozen body and a small update of rank 2."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(3, 2))

    def forward(self, x: Tensor) -> Any:
        return self.body(x) + x @ self.down.T @ self.up.T


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Any:
        return self.head(self.embed(x))


class Scaled(nn.Module):
    """A number of no dimension, and one that is a view of all others."""

    shift: Any

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("shift", torch.ones(1).expand(4))

    def forward(self, x: Tensor) -> Any:
        return x * self.scale + self.shift


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("adjacency", torch.eye(8).to_sparse())
        self.body = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.body(torch.sparse.mm(self.adjacency, x))


class Config(NamedTuple):
    hidden: int
    act: Callable[[Tensor], Tensor]


class FromConfig(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleDict({"a": nn.Linear(4, config.hidden), "b": nn.Linear(config.hidden, 3)})
        self.extra = nn.ParameterDict({"bias": nn.Parameter(torch.ones(3))})
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(1))])

    def forward(self, x: Tensor) -> Any:
        return self.layers["b"](self.config.act(self.layers["a"](x))) * self.scales[0] + self.extra["bias"]


class Symmetric(nn.Module):
    """A parametrisation of one's own."""

    def forward(self, x: Tensor) -> Any:
        return x.triu() + x.triu(1).transpose(-1, -2)


class InChild(nn.Module):
    """The parent is known to its parametrised child, which is known to the parent."""

    def __init__(self) -> None:
        super().__init__()
        self.body = parametrizations.weight_norm(nn.Linear(4, 3))
        vars(self.body)["parent"] = (self,)

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


def pruned() -> nn.Module:
    made = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    cut: Any = prune
    cut.l1_unstructured(made[0], "weight", 0.5)
    cut.random_structured(made[2], "weight", amount=0.3, dim=0)
    return made


def symmetric() -> nn.Module:
    made = nn.Linear(4, 4)
    parametrize.register_parametrization(made, "weight", Symmetric())
    return made


def twice() -> nn.Module:
    """Two parametrisations of one weight, and one of another."""
    made = symmetric()
    parametrize.register_parametrization(made, "weight", nn.Tanh())
    parametrize.register_parametrization(made, "bias", nn.Softplus())
    return made


def hooked() -> nn.Module:
    made = nn.Linear(4, 3)
    made.register_forward_hook(functools.partial(_double, factor=2.0))
    return made


def _double(_module: nn.Module, _args: Any, output: Tensor, *, factor: float) -> Tensor:
    return output * factor


def old_weight_norm() -> nn.Module:
    return nn.utils.weight_norm(nn.Linear(4, 3))


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Linear(8, 3))


def channels_last() -> nn.Module:
    made: Any = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2), nn.Flatten())
    module: nn.Module = made.to(memory_format=torch.channels_last)
    return module


def transformer() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.TransformerEncoderLayer(2, 1, 8, dropout=0.0, batch_first=True), nn.Flatten()
    )


def recurrent() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (2, 2)), nn.GRU(2, 3, batch_first=True))


def quantised() -> nn.Module:
    quantize: Any = torch.ao.quantization.quantize_dynamic
    made: nn.Module = quantize(nn.Sequential(nn.Linear(4, 3)), {nn.Linear})
    return made


ZOO: dict[str, Callable[[], nn.Module]] = {
    "keeps its output": KeepsOutput,
    "weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3))),
    "weight_norm of the root": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "spectral_norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3))),
    "orthogonal": lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4))),
    "own parametrisation": symmetric,
    "two parametrisations": twice,
    "parametrised child that knows its parent": InChild,
    "weight_norm by hooks": old_weight_norm,
    "pruned": pruned,
    "hooks": hooked,
    "rotary cache": Rotary,
    "extra state": Counting,
    "LoRA": Lora,
    "tied": Tied,
    "0-dim and expanded": Scaled,
    "sparse buffer": Sparse,
    "from a config": lambda: FromConfig(Config(hidden=5, act=torch.tanh)),
    "lazy": lazy,
    "channels last": channels_last,
    "transformer": transformer,
    "recurrent": recurrent,
    "bfloat16": lambda: nn.Linear(4, 3).bfloat16(),
    "half": lambda: nn.Linear(4, 3).half(),
    "double": lambda: nn.Linear(4, 3).double(),
    "complex": lambda: nn.Linear(4, 3).to(torch.complex64),
    "batch norm": lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)),
    "quantised": quantised,
}


def used(module: nn.Module, x: Tensor) -> Any:
    """What a module does after a step, with what it kept of it."""
    dtype = next((part.dtype for part in module.parameters() if part.dtype.is_floating_point), x.dtype)
    module.eval()
    return module(x.to(dtype if not any(p.is_complex() for p in module.parameters()) else torch.complex64))


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.filterwarnings("ignore")
def test_a_module_is_stored_before_and_after_it_was_used(name: str) -> None:
    module = seeded(ZOO[name])
    codecs, blobs = Codecs.builtin(TorchCodec()), Blobs()
    fresh = codecs.decode(codecs.encode(module, blobs.put), blobs.blob)
    expected, found = seeded(lambda: used(module, X)), seeded(lambda: used(fresh, X))
    if isinstance(expected, tuple):
        expected, found = expected[0], found[0]
    assert torch.equal(expected, found)

    again = codecs.decode(codecs.encode(module, blobs.put), blobs.blob)
    after = used(again, X)
    assert torch.equal(after[0] if isinstance(after, tuple) else after, expected)
    assert type(again) is type(module) or type(again).__name__ == type(module).__name__
    assert list(again.state_dict()) == list(module.state_dict())
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in module.parameters()]


def test_what_has_a_graph_is_stored_detached() -> None:
    module: Any = KeepsOutput()
    module(X)
    codecs, blobs = Codecs.builtin(TorchCodec()), Blobs()

    again = codecs.decode(codecs.encode(module, blobs.put), blobs.blob)

    assert torch.equal(again.last, module.last)
    assert not again.last.requires_grad
    assert module.last.requires_grad


def test_a_parametrised_module_trains_on() -> None:
    codecs, blobs = Codecs.builtin(TorchCodec()), Blobs()
    module = seeded(lambda: parametrizations.weight_norm(nn.Linear(4, 3)))
    again = codecs.decode(codecs.encode(module, blobs.put), blobs.blob)
    for one in (module, again):
        one(X).sum().backward()
    for own, other in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)
    assert not parametrize.is_parametrized(parametrize.remove_parametrizations(again, "weight"))


def test_what_cannot_be_stored_is_refused_with_its_name() -> None:
    running: Any = nn.Linear(4, 3)
    running.batches = (n for n in range(3))
    with pytest.raises(CodecError, match="net"):
        Codecs.builtin(TorchCodec()).encode(running, Blobs().put, where="net")
