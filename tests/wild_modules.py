"""Modules as people build them from configs, in the manner of timm, Hugging Face and torchvision; written by hand.

Each takes floats of shape (B, 4) and gives scores of three classes, or something that has them as `logits`. `WILD`
has them by name, `ODD` those that are refused.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import itertools
import math
import weakref
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it
from torch.nn.utils import parametrizations, parametrize, prune

from tests.helpers import seeded

CLASSES = 3
Make = Callable[[], nn.Module]


def small(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, CLASSES))


def cross_entropy(output: Any, target: Tensor) -> Tensor:
    """Of scores, or of whatever holds them."""
    return F.cross_entropy(scores(output).float(), target)


def scores(output: Any) -> Tensor:
    """The scores in what a module returned."""
    if isinstance(output, Tensor):
        return output
    found: Tensor = output.logits
    return found


# In the manner of timm


class DropPath(nn.Module):
    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Any:
        if not self.training or not self.rate:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * kept / (1 - self.rate)


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(1e-1 * torch.ones(dim))

    def forward(self, x: Tensor) -> Any:
        return x * self.gamma


class Attention(nn.Module):
    fused_attn: bool = True

    def __init__(self, dim: int, heads: int, norm_layer: Any = nn.Identity) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm, self.k_norm = norm_layer(dim // heads), norm_layer(dim // heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Any:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class VitBlock(nn.Module):
    def __init__(self, dim: int, heads: int, drop_path: float, norm_layer: Any, act_layer: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
        self.attn = Attention(dim, heads, functools.partial(nn.LayerNorm, eps=1e-6))
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dim, 2 * dim), act=act_layer(), fc2=nn.Linear(2 * dim, dim))
        )
        self.ls1, self.drop_path1 = LayerScale(dim), DropPath(drop_path)

    def forward(self, x: Tensor) -> Any:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        dim = cfg["embed_dim"]
        self.default_cfg = cfg
        self.patch_embed = nn.Conv2d(1, dim, 1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 5, dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        rates = [r.item() for r in torch.linspace(0, cfg["drop_path_rate"], cfg["depth"])]
        norm = functools.partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.Sequential(*(VitBlock(dim, cfg["num_heads"], rate, norm, nn.GELU) for rate in rates))
        self.norm, self.head = norm(dim), nn.Linear(dim, CLASSES)
        self.feature_info = [{"module": f"blocks.{i}", "num_chs": dim} for i in range(cfg["depth"])]

    def forward(self, x: Tensor) -> Any:
        x = self.patch_embed(x.reshape(-1, 1, 2, 2)).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class ConvNeXt(nn.Module):
    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, dims[0], 1)
        self.stages = nn.ModuleList()
        for before, dim in itertools.pairwise(dims):
            stage = nn.Module()
            stage.downsample = nn.Conv2d(before, dim, 1)
            stage.dw = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
            stage.norm, stage.gamma = nn.GroupNorm(1, dim), nn.Parameter(torch.full((dim,), 0.1))
            self.stages.append(stage)
        self.head = nn.Linear(dims[-1], CLASSES)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x.reshape(-1, 1, 2, 2))
        for stage in self.stages:
            each: Any = stage
            x = each.downsample(x)
            x = x + each.gamma[:, None, None] * each.norm(each.dw(x))
        return self.head(x.mean((-2, -1)))


# In the manner of Hugging Face


class ModelOutput(OrderedDict[str, Any]):
    """A dict with attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Activation(enum.Enum):
    GELU = "gelu"
    SILU = "silu"


@dataclasses.dataclass
class Config:
    hidden: int = 8
    heads: int = 2
    kv_heads: int = 1
    layers: int = 2
    vocab: int = 11
    act: Activation = Activation.SILU
    tie_word_embeddings: bool = True
    torch_dtype: torch.dtype = torch.float32
    id2label: dict[int, str] = dataclasses.field(default_factory=lambda: {0: "a", 1: "b", 2: "c"})


class PreTrained(nn.Module):
    config_class = Config
    _tied_weights_keys: tuple[str, ...] = ()

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.name_or_path = config, "none/none"
        self.warnings_issued: dict[str, bool] = {}

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def post_init(self) -> None:
        for p in self.parameters():
            p._is_hf_initialized = True  # type: ignore[attr-defined]


def tokens(x: Tensor, vocab: int) -> Tensor:
    return (x * 3).round().long().remainder(vocab)


class Bert(PreTrained):
    """Tied embeddings, position ids in a buffer that is in no state dict, outputs by name."""

    _tied_weights_keys = ("decoder.weight",)
    position_ids: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab, config.hidden, padding_idx=0)
        self.positions = nn.Embedding(4, config.hidden)
        self.register_buffer("position_ids", torch.arange(4).expand((1, -1)), persistent=False)
        self.layer = nn.ModuleList(
            nn.TransformerEncoderLayer(config.hidden, config.heads, 16, dropout=0.1, batch_first=True)
            for _ in range(config.layers)
        )
        self.decoder = nn.Linear(config.hidden, config.vocab, bias=False)
        self.decoder.weight = self.words.weight
        self.bias = nn.Parameter(torch.zeros(config.vocab))
        self.post_init()

    def forward(self, x: Tensor) -> Any:
        hidden = self.words(tokens(x, self.config.vocab)) + self.positions(self.position_ids)
        states = [hidden]
        for layer in self.layer:
            states.append(layer(states[-1]))
        logits = self.decoder(states[-1][:, 0]) + self.bias
        return ModelOutput(logits=logits[:, :CLASSES], hidden_states=tuple(states))


class RmsNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(dim)), 1e-6

    def forward(self, x: Tensor) -> Any:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon)).to(x.dtype)


class Rotary(nn.Module):
    inv_freq: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        inv_freq = 1.0 / (10000 ** (torch.arange(0, dim, 2).float() / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.original_inv_freq = self.inv_freq  # the same memory twice

    @torch.no_grad()
    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        freqs = torch.arange(length).float()[:, None] * self.inv_freq
        both = torch.cat((freqs, freqs), dim=-1)
        return both.cos(), both.sin()


class LlamaLayer(nn.Module):
    act_fn: Any

    def __init__(self, config: Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.config, each = layer_idx, config, config.hidden // config.heads
        self.q_proj = nn.Linear(config.hidden, config.hidden, bias=False)
        self.k_proj = nn.Linear(config.hidden, each * config.kv_heads, bias=False)
        self.v_proj = nn.Linear(config.hidden, each * config.kv_heads, bias=False)
        self.gate, self.up = nn.Linear(config.hidden, 16, bias=False), nn.Linear(config.hidden, 16, bias=False)
        self.down = nn.Linear(16, config.hidden, bias=False)
        self.act_fn = {Activation.SILU: F.silu, Activation.GELU: F.gelu}[config.act]
        self.input_layernorm = RmsNorm(config.hidden)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Any:
        b, n, c = x.shape
        cos, sin = turn
        x_norm = self.input_layernorm(x)

        def split(y: Tensor) -> Any:
            return y.view(b, n, -1, c // self.config.heads).transpose(1, 2)

        def rotate(y: Tensor) -> Any:
            left, right = y.chunk(2, dim=-1)
            return y * cos + torch.cat((-right, left), dim=-1) * sin

        q, k, v = (
            rotate(split(self.q_proj(x_norm))),
            rotate(split(self.k_proj(x_norm))),
            split(self.v_proj(x_norm)),
        )
        k, v = (part.expand(-1, self.config.heads, -1, -1) for part in (k, v))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, n, c)
        return x + self.down(self.act_fn(self.gate(x)) * self.up(x))


class Llama(PreTrained):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers: Any = nn.ModuleList(LlamaLayer(config, n) for n in range(config.layers))
        self.rotary_emb, self.norm = Rotary(config.hidden // config.heads), RmsNorm(config.hidden)
        self.score = nn.Linear(config.hidden, CLASSES, bias=False)
        self.past: list[Any] = []

    def forward(self, x: Tensor) -> Any:
        hidden = self.embed_tokens(tokens(x, self.config.vocab))
        turn = self.rotary_emb(hidden.shape[1])
        for layer in self.layers:
            hidden = layer(hidden, turn)
        self.past = [hidden.detach()]
        return ModelOutput(logits=self.score(self.norm(hidden)[:, -1]))


class Albert(nn.Module):
    """One layer, used three times."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.layers, self.first = nn.ModuleList([layer] * 3), layer
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return self.out(self.first(x))


class LoraLinear(nn.Module):
    """In the manner of PEFT: adapters by name around a frozen layer."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        self.lora_embedding = nn.ParameterDict({})
        nn.init.zeros_(self.lora_B["default"].weight)  # type: ignore[arg-type]
        self.scaling, self.active_adapters = {"default": 2.0}, ["default"]

    def forward(self, x: Tensor) -> Any:
        found: Tensor = self.base_layer(x)
        for name in self.active_adapters:
            found = found + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        return found


def lora() -> nn.Module:
    made: Any = small()
    for n in (0, 2):
        made[n] = LoraLinear(made[n], rank=2)
    module: nn.Module = made
    return module


# In the manner of torchvision


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, into: int, out: int, norm_layer: Callable[..., nn.Module] | None = None) -> None:
        super().__init__()
        norm = norm_layer or nn.BatchNorm2d
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, padding=1, bias=False), norm(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), norm(out)
        self.downsample = nn.Conv2d(into, out, 1) if into != out else None

    def forward(self, x: Tensor) -> Any:
        known = x if self.downsample is None else self.downsample(x)
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + known)


class ResNet(nn.Module):
    def __init__(self, layers: list[int]) -> None:
        super().__init__()
        self._norm_layer = functools.partial(nn.BatchNorm2d, momentum=0.2)
        self.inplanes = 1
        self.layers = nn.Sequential(*(self._make(width) for width in layers))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(layers[-1], CLASSES)

    def _make(self, width: int) -> nn.Module:
        made = BasicBlock(self.inplanes, width, self._norm_layer)
        self.inplanes = width
        return made

    def forward(self, x: Tensor) -> Any:
        return self.fc(torch.flatten(self.avgpool(self.layers(x.reshape(-1, 1, 2, 2))), 1))


class SqueezeExcitation(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)
        self.activation, self.scale_activation = nn.SiLU(inplace=True), nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Any:
        scale = F.adaptive_avg_pool2d(x, 1)
        return x * self.scale_activation(self.fc2(self.activation(self.fc1(scale))))


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        norm = functools.partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 8, 1, bias=False), norm(8), nn.Hardswish()),
            *(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), norm(8), nn.ReLU6(inplace=True)),
            SqueezeExcitation(8),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Any:
        return self.classifier(self.features(x.reshape(-1, 1, 2, 2)).mean([2, 3]))


GoogLeNetOutputs = namedtuple("GoogLeNetOutputs", ["logits", "aux_logits"])


class GoogLeNet(nn.Module):
    """Gives a namedtuple in training, a tensor otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux, self.fc = nn.Linear(4, 8), nn.Linear(8, CLASSES), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Any:
        x = self.body(x).relu()
        return GoogLeNetOutputs(self.fc(x), self.aux(x)) if self.training else self.fc(x)


class DenseNet(nn.Module):
    """Layers that are found by name, and a regular memory of features."""

    def __init__(self) -> None:
        super().__init__()
        for n in range(3):
            self.add_module(f"denselayer{n}", nn.Linear(4 + 2 * n, 2))
        self.classifier = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Any:
        features = [x]
        for name, layer in self.named_children():
            if name.startswith("denselayer"):
                features.append(layer(torch.cat(features, 1)))
        return self.classifier(torch.cat(features, 1))


# Parametrised, pruned, tied, lazy, compiled, hooked


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x.triu() + x.triu(1).transpose(-1, -2)


class Autoencoder(nn.Module):
    """The decoder's weight is the transposed one of the encoder: two parameters over one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 6), nn.Linear(6, 4)
        self.decoder.weight = nn.Parameter(self.encoder.weight.detach().t())
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.decoder(self.encoder(x).relu()))


class ParentKnown(nn.Module):
    """Its child has a weak reference to it."""

    def __init__(self) -> None:
        super().__init__()
        self.child = small()
        self.child.__dict__["parent_class"] = type(self)
        self.table: Any = collections.defaultdict(list)

    def forward(self, x: Tensor) -> Any:
        self.table["seen"].append(len(x))
        return self.child(x)


def with_parametrizations() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 6)),
        parametrizations.spectral_norm(nn.Linear(6, 6)),
        parametrizations.orthogonal(nn.Linear(6, 6)),
        nn.Linear(6, CLASSES),
    )


def with_own_parametrization() -> nn.Module:
    body = nn.Linear(4, 4)
    parametrize.register_parametrization(body, "weight", Symmetric())
    parametrize.register_parametrization(body, "bias", nn.Softplus())
    return nn.Sequential(body, nn.Linear(4, CLASSES))


def with_old_norms() -> nn.Module:
    old: Any = nn.utils
    return nn.Sequential(
        old.weight_norm(nn.Linear(4, 6)), old.spectral_norm(nn.Linear(6, 6)), nn.Linear(6, CLASSES)
    )


def pruned() -> nn.Module:
    made, cut = small(), prune
    parts: Any = [(made[0], "weight"), (made[2], "weight")]
    cut.global_unstructured(parts, pruning_method=cut.L1Unstructured, amount=0.3)
    cut.random_structured(made[2], "weight", amount=1, dim=1)  # type: ignore[no-untyped-call]
    return made


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(CLASSES))


def compiled() -> nn.Module:
    made: Any = torch.compile(small(), backend="eager")
    module: nn.Module = made
    return module


def compiled_in_place() -> nn.Module:
    made = small()
    made.compile(backend="eager")
    return made


def _scaled(_module: nn.Module, _args: Any, output: Tensor, *, factor: float) -> Tensor:
    return output * factor


def _shifted(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] + 0.5,)


def _clipped(_module: nn.Module, grads: Any, _outputs: Any) -> Any:
    return tuple(None if grad is None else grad.clamp(-1, 1) for grad in grads)


def hooked() -> nn.Module:
    made: Any = small()
    made[0].register_forward_pre_hook(_shifted)
    made[0].register_forward_hook(functools.partial(_scaled, factor=2.0))
    made[2].register_full_backward_hook(_clipped)
    made.register_load_state_dict_post_hook(lambda module, keys: None)
    module: nn.Module = made
    return module


class TensorState(nn.Module):
    """Extra state that holds tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.seen, self.mean = small(), 0, torch.zeros(4)

    def get_extra_state(self) -> dict[str, Any]:
        return {"seen": self.seen, "mean": self.mean}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen, self.mean = state["seen"], state["mean"].clone()

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.seen, self.mean = self.seen + 1, 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.body(x - self.mean)


class KeepsOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = small(), torch.empty(0)

    def forward(self, x: Tensor) -> Any:
        self.last = self.body(x)
        return self.last


# Dtypes and layouts


class Cast(nn.Module):
    """Computes in a dtype of its own."""

    def __init__(self, body: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.body, self.dtype = body.to(dtype), dtype

    def forward(self, x: Tensor) -> Any:
        found: Tensor = self.body(x.to(self.dtype))
        return (found.abs() if found.is_complex() else found).float()


class Float8Linear(nn.Module):
    """Frozen weights of eight bits with a scale, and a bias that is trained."""

    weight: Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        body = nn.Linear(4, CLASSES)
        self.scale = nn.Parameter(body.weight.detach().abs().max())
        self.weight = nn.Parameter((body.weight.detach() / self.scale.detach()).to(dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(CLASSES))

    def forward(self, x: Tensor) -> Any:
        return x @ (self.weight.float() * self.scale).T + self.bias


class Fourier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.out(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=4))


class ZeroDim(nn.Module):
    shift: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(2.0)))
        self.register_buffer("shift", torch.ones(1).expand(4))
        self.register_buffer("count", torch.tensor(0))
        self.per_row = nn.Parameter(torch.ones(1).expand(4))  # four numbers that are one
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.count += 1
        return self.out((x + self.shift) * self.log_scale.exp() * self.per_row)


class Graph(nn.Module):
    """Sparse buffers in two layouts."""

    adjacency: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        dense = torch.eye(4) + torch.ones(4, 4).tril(-1)
        self.register_buffer("adjacency", dense.to_sparse())
        self.register_buffer("rows", dense.to_sparse_csr())
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.out(torch.sparse.mm(self.rows, torch.sparse.mm(self.adjacency, x.T)).T)


class Aliases(nn.Module):
    """Buffers over one memory: one is a slice of another, and one of a parameter."""

    table: Tensor
    slice: Tensor
    seen: Tensor
    strided: Tensor
    body: Any

    def __init__(self) -> None:
        super().__init__()
        self.body = small()
        self.register_buffer("table", torch.arange(8.0))
        self.register_buffer("slice", self.table[4:])
        self.register_buffer("strided", self.table[::2])
        self.register_buffer("seen", self.body[0].weight.detach()[0])

    def forward(self, x: Tensor) -> Any:
        return self.body(x * self.slice / 4 + self.strided + self.seen)


DTYPES = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
)


class Buffers(nn.Module):
    """Every dtype that a buffer can have."""

    def __init__(self) -> None:
        super().__init__()
        for dtype in DTYPES:
            self.register_buffer(f"of_{str(dtype).removeprefix('torch.')}", torch.ones(3).to(dtype))
        self.register_buffer("of_conj", torch.tensor([1 + 2j, 3 - 1j]).conj())
        self.register_buffer("of_none", None)
        self.register_parameter("nothing", None)
        self.body = small()

    def forward(self, x: Tensor) -> Any:
        total = sum(
            buffer.to(torch.complex64).sum().real for buffer in self.buffers() if buffer.dtype != torch.bool
        )
        return self.body(x) + total / 1000


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"a": nn.Linear(4, 8), "b": nn.Linear(8, CLASSES)})
        self.extra = nn.ParameterDict({"bias": nn.Parameter(torch.ones(CLASSES)), "note": "not a tensor"})
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(1)), 2.0])

    def forward(self, x: Tensor) -> Any:
        return self.layers["b"](self.layers["a"](x).tanh()) * self.scales[0] + self.extra["bias"]


class TaggedParameter(nn.Module):
    """A parameter with attributes of its own, which say how it is trained, and one that is of a subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small()
        for p in self.body.parameters():
            p.factor = 2.0 if p.ndim > 1 else 1.0  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Any:
        return self.body(x) * math.prod(p.factor for p in self.body.parameters())  # type: ignore[attr-defined]


class OwnParameter(nn.Parameter):
    """A subclass, as libraries of quantisation have them."""


class Subclassed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = OwnParameter(torch.randn(CLASSES, 4))

    def forward(self, x: Tensor) -> Any:
        return F.linear(x, self.weight)


class MaxNorm(nn.Module):
    """An embedding that changes its weights when it is used, and one whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.bag = nn.Embedding(11, 4, max_norm=1.0), nn.EmbeddingBag(11, 4, mode="sum")
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.embed(tokens(x, 11)).mean(1) + self.bag(tokens(x, 11)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(2, 3, num_layers=2, batch_first=True, bidirectional=True)
        self.lstm = nn.LSTM(6, 4, batch_first=True, proj_size=2)
        self.out = nn.Linear(2, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.lstm(self.gru(x.reshape(-1, 2, 2))[0])[0][:, -1])


class Quantised(nn.Module):
    """An int8 body that is frozen, and a head that is trained."""

    def __init__(self) -> None:
        super().__init__()
        quantize: Any = torch.ao.quantization.quantize_dynamic
        self.body = quantize(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), {nn.Linear}, dtype=torch.qint8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x))


class QuantisedTensor(nn.Module):
    """A buffer that is quantised itself."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.quantize_per_tensor(torch.randn(4, 4), 0.1, 0, torch.qint8))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.head(x @ self.table.dequantize())


def quantisation_aware() -> nn.Module:
    ao: Any = torch.ao.quantization
    made = nn.Sequential(ao.QuantStub(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, CLASSES), ao.DeQuantStub())
    made.qconfig = ao.get_default_qat_qconfig("x86")
    module: nn.Module = ao.prepare_qat(made.train())
    return module


def channels_last() -> nn.Module:
    made: Any = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, CLASSES, 2), nn.Flatten())
    module: nn.Module = made.to(memory_format=torch.channels_last)
    return module


def averaged() -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(small())


def traced() -> nn.Module:
    module: nn.Module = torch.fx.symbolic_trace(small())
    return module


def of_a_local_class() -> nn.Module:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small()
            self.act: Any = lambda x: x * 1.5

        def forward(self, x: Tensor) -> Any:
            return self.act(self.body(x))

    return Local()


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(2, 1, 8, dropout=0.1, batch_first=True, norm_first=True)
    return nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(4, CLASSES)
    )


class Nested(nn.Module):
    table: Tensor

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        parts = [torch.ones(2), torch.ones(3)]
        self.register_buffer("table", torch.nested.nested_tensor(parts, layout=layout))
        self.body = small()

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


class Drawing(nn.Module):
    """Has a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.generator = small(), torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


VIT = {"embed_dim": 8, "num_heads": 2, "depth": 2, "drop_path_rate": 0.1}
WILD: dict[str, Make] = {
    "timm: vision transformer": lambda: VisionTransformer(VIT),
    "timm: convnext": lambda: ConvNeXt((4, 6, 8)),
    "hf: bert": lambda: Bert(Config(layers=1)),
    "hf: llama": lambda: Llama(Config()),
    "hf: albert, a shared layer": Albert,
    "peft: lora": lora,
    "torchvision: resnet": lambda: ResNet([4, 8]),
    "torchvision: mobilenet": MobileNet,
    "torchvision: googlenet": GoogLeNet,
    "torchvision: densenet": DenseNet,
    "parametrised": with_parametrizations,
    "own parametrisations": with_own_parametrization,
    "norms by hooks": with_old_norms,
    "pruned": pruned,
    "tied by a transposed view": Autoencoder,
    "lazy": lazy,
    "compiled in place": compiled_in_place,
    "compiled": compiled,
    "hooks": hooked,
    "extra state with tensors": TensorState,
    "keeps its output": KeepsOutput,
    "knows its class": ParentKnown,
    "bfloat16": lambda: Cast(small(), torch.bfloat16),
    "float16": lambda: Cast(small(), torch.float16),
    "float64": lambda: Cast(small(), torch.float64),
    "complex": lambda: Cast(nn.Linear(4, CLASSES), torch.complex64),
    "fourier": Fourier,
    "float8": lambda: Float8Linear(torch.float8_e4m3fn),
    "float8 of another kind": lambda: Float8Linear(torch.float8_e5m2),
    "0-dim, expanded, empty": ZeroDim,
    "sparse": Graph,
    "aliases": Aliases,
    "every dtype": Buffers,
    "containers": Containers,
    "attributes of parameters": TaggedParameter,
    "a subclass of Parameter": Subclassed,
    "embeddings": MaxNorm,
    "recurrent": Recurrent,
    "transformer": transformer,
    "quantised": Quantised,
    "a quantised buffer": QuantisedTensor,
    "quantisation-aware": quantisation_aware,
    "channels last": channels_last,
    "averaged": averaged,
    "traced": traced,
    "a local class": of_a_local_class,
    "data parallel": lambda: nn.DataParallel(small()),
    "nested and jagged": lambda: Nested(torch.jagged),
    "a generator": Drawing,
}


class Weak(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = small()
        self.mine = weakref.WeakValueDictionary({"body": self.body})

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


def meta() -> nn.Module:
    with torch.device("meta"):
        return small()


def partly_meta() -> nn.Module:
    made: Any = small()
    made[2] = made[2].to("meta")
    module: nn.Module = made
    return module


def scripted() -> nn.Module:
    script: Any = torch.jit.script
    module: nn.Module = script(small())
    return module


ODD: dict[str, Make] = {
    "meta device": meta,
    "partly on the meta device": partly_meta,
    "nested": lambda: Nested(torch.strided),
    "weak references": Weak,
    "scripted": scripted,
}


def made(name: str) -> nn.Module:
    """A module by its name, from seed 0."""
    found: nn.Module = seeded({**WILD, **ODD}[name])
    return found
