"""One run on 1, 2 or 4 ranks ends with the same bits, wherever it was stopped, and all ranks decide alike."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.helpers import same, seeded, state
from torch import Tensor, nn

from mongotorch import Metric, TorchModel, TorchTrainer, Validation
from mongotorch.data.stream.batches import LaneBatches
from mongotorch.errors import DataError, MongotorchError, NonFiniteLossError, ParameterError, WorkerLostError
from mongotorch.query import Query
from mongotorch.testing.groups import run_ranks, thread_groups
from mongotorch.train import Alone, Fit, Group, ProcessGroup, Stepped, Validated

ROWS, LANES, WORLDS = 79, 4, (1, 2, 4)  # three steps of 24 rows and one of 7


class Cut:
    """The steps of a rank, cut as a stream cuts them."""

    def __init__(self, of: TorchTrainer, group: Group, *, rows: int = ROWS, classes: int = 3) -> None:
        draw = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(rows, 8, generator=draw), torch.randint(0, classes, (rows,), generator=draw)
        self.size: int = of.loader_kwargs["batch_size"] * of.gradient_accumulation_steps  # type: ignore[index]
        self.lanes = of.lanes.mine(group.rank, group.world)
        self.count = of.lanes.lanes
        self.epoch, self.step = 0, 0

    def __len__(self) -> int:
        return -(-len(self.x) // self.size)

    def __iter__(self) -> Iterator[LaneBatches]:
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(self.epoch))
        for chosen in torch.split(order, self.size)[self.step :]:
            self.step += 1
            parts = [part for n, part in enumerate(chosen.tensor_split(self.count)) if n in self.lanes]
            batches = tuple(self.batch(part) if len(part) else None for part in parts)
            rows = tuple(map(len, parts))
            yield LaneBatches(
                batches=batches, rows=rows, planned=len(chosen), skipped=0, position=self.step % 4096
            )
        self.epoch, self.step = self.epoch + 1, 0

    def batch(self, chosen: Tensor) -> Any:
        return self.x[chosen], self.y[chosen]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.step = state["epoch"], state["step"]


class Whole(nn.Module):
    """A small transformer over the eight numbers of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.layer(self.first(x.view(-1, 4, 2))).mean(1))
        return found


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv1d(1, 4, 3),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(24, 3)),
    )


class Sparing(nn.Module):
    """It uses one of its parts only where the first number of a batch is large, and counts in a buffer."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 3), nn.Linear(8, 3)
        self.never = nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
        found: Tensor = self.one(x)
        return found + self.two(x).clamp(min=0.0) if x[0, 0] > 0.8 else found


class OddBuffers(nn.Module):
    """It has a buffer that is None, and one whose elements are one in memory, which nothing changes in place."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.InstanceNorm1d(1), nn.Linear(8, 3)
        self.register_buffer("scale", torch.full((1,), 0.5).expand(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.norm(x[:, None])[:, 0] * self.scale)
        return found


IGNORING = functools.partial(nn.functional.cross_entropy, ignore_index=0)


class Own(TorchTrainer):
    """Its own gradients, an update with noise, values logged in a step, and a validation of its own."""

    def backward(self, model: TorchModel, batch: Any, share: float = 1.0) -> Tensor:
        loss = super().backward(model, batch, share)
        penalty = torch.stack([(one**2).sum() for one in model.parameters()]).sum() * 0.01
        self.scale_loss(penalty * share).backward()  # type: ignore[no-untyped-call]
        self.log("penalty", penalty)
        return loss

    def update(self, model: TorchModel, optimizers: Any) -> None:
        for one in model.parameters():
            one.grad = torch.randn_like(one).mul(0.01).add(one.grad)  # type: ignore[arg-type]
        self.log("noise", torch.rand(()))
        super().update(model, optimizers)

    def validate(self, model: TorchModel, batch: Any) -> Any:
        output = model.object(batch[0])
        return {"objective": cross_entropy(output, batch[1]) + torch.rand(()), "largest": output.max()}


class Halves:
    """A callback that halves the rate after each second validation, and ends the run at a step."""

    def __init__(self) -> None:
        self.seen = 0

    def on_validation(self, fit: Fit, event: Validated) -> None:
        self.seen += 1
        for group in fit.optimizers[0].param_groups:
            group["lr"] *= 0.5 if self.seen % 2 == 0 else 1.0

    def on_step(self, fit: Fit, event: Stepped) -> None:
        if event.step == 7:
            fit.stop()

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.seen = state["seen"]


RECIPES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "mlp, dropout, adam": (mlp, {"optimizer_kwargs": {"lr": 0.01}}),
    "cnn, norms, momentum": (cnn, {"optimizer_cls": "SGD", "optimizer_kwargs": {"lr": 0.05, "momentum": 0.9}}),
    "transformer, whole recipe": (
        Whole,
        {
            "loader_kwargs": {"batch_size": 8},
            "gradient_accumulation_steps": 3,
            "optimizer_cls": "AdamW",
            "scheduler_cls": "OneCycleLR",
            "scheduler_kwargs": {"max_lr": 0.01, "total_steps": "max_iterations"},
            "gradient_clip_norm": 0.5,
            "ema_decay": 0.9,
            "precision": "bf16",
        },
    ),
    "scaled": (mlp, {"precision": "fp16", "gradient_clip_value": 0.1}),
    "parts that are not used": (
        Sparing,
        {"optimizer_cls": "SGD", "optimizer_kwargs": {"lr": 0.1, "momentum": 0.9}},
    ),
    "odd buffers": (OddBuffers, {"optimizer_kwargs": {"lr": 0.01}}),
    "own methods, a callback": (mlp, {"cls": Own, "callbacks": Halves}),
    "some targets are left out": (mlp, {"objective": IGNORING, "optimizer_kwargs": {"lr": 0.01}}),
    "stops early, plateau": (
        mlp,
        {
            "scheduler_cls": "ReduceLROnPlateau",
            "scheduler_kwargs": {"patience": 0},
            "optimizer_kwargs": {"lr": 0.2},
            "validation_interval": 1,
            "no_improve_then_stop": 3,
            "max_iterations": 100,
            "listen": "weighed",
        },
    ),
    "doubles": (lambda: mlp().double(), {"optimizer_kwargs": {"lr": 0.01, "weight_decay": 0.1}}),
}


MLP = seeded(mlp)


class Accuracy:
    """A metric that needs all outputs."""

    higher_is_better = True

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    def __call__(self, output: Tensor, target: Tensor) -> float:
        raise NotImplementedError

    def reset(self) -> None:
        self.outputs = []

    def update(self, output: Tensor, target: Tensor) -> None:
        self.outputs.append(output.argmax(1) == target)

    def compute(self) -> Tensor:
        weights = torch.arange(1, 1 + sum(map(len, self.outputs)))
        return (torch.cat(self.outputs) * weights).sum() / weights.sum()


def right(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).float().mean()


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.float() if output.dtype != torch.float64 else output, target)


def trainer(cls: type[TorchTrainer] = TorchTrainer, **given: Any) -> TorchTrainer:
    usual: dict[str, Any] = {
        "key": ("x", "y"),
        "select": Query.find("points"),
        "objective": cross_entropy,
        "loader_kwargs": {"batch_size": 24},
        "compute_kwargs": {"workers": (1, 4), "lanes": LANES},
        "max_iterations": 10,
        "validation_interval": 3,
    }
    if "callbacks" in given:
        given["callbacks"] = [given["callbacks"]()]
    return cls("t", **{**usual, **given})


def fitting(of: TorchTrainer, module: nn.Module, group: Group, captured: Any = None) -> Fit:
    metrics = [Metric("right", object=right), Metric("weighed", object=Accuracy())]
    validation = Validation("v", metrics=metrics)
    model = TorchModel("m", object=copy.deepcopy(module), validation=validation)
    batches = Cut(of, group)
    dtype = next(model.object.parameters()).dtype
    batches.x = batches.x.to(dtype)
    rows = list(zip(torch.split(batches.x, 5)[:7], torch.split(batches.y, 5)[:7], strict=True))
    return Fit(of, model, batches=batches, sets={"": rows[group.rank :: group.world]}, state=captured, group=group)


def outcome(fit: Fit) -> list[Any]:
    """Weights, what was published, and what a checkpoint has, without what may differ."""
    captured = fit.capture()
    for name in ("spent_s", "random"):
        captured.pop(name)
    last = state(fit.model)
    trained = fit.trained()
    found = {field.name: getattr(trained, field.name) for field in dataclasses.fields(trained)}
    found.pop("compute")
    return [last, state(fit.model), found, captured]


def digest(value: Any) -> str:
    """The SHA-256 of all bytes of a structure."""
    made = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            made.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, Mapping):
            for key in part:
                add((key, part[key]))
        elif isinstance(part, list | tuple):
            for one in part:
                add(one)
        else:
            made.update(repr(part).encode())

    add(value)
    return made.hexdigest()


def events(fit: Fit) -> list[Any]:
    return [
        (event.step, float(event.loss), event.rows, {name: float(value) for name, value in event.values.items()})
        if isinstance(event, Stepped)
        else (event.step, event.values)
        for event in fit.run()
    ]


def ran(name: str, world: int) -> list[Any]:
    make, given = RECIPES[name]
    module = seeded(make)  # here, as the threads draw from the same generators

    def rank_main(group: Group) -> Any:
        fit = fitting(trainer(**given), module, group)
        return events(fit), outcome(fit)

    results = run_ranks(world, rank_main)
    for one in results:
        if isinstance(one, Exception):
            raise one
    for one in results:  # what the first lane logs is on rank 0
        assert [event[:2] for event in one[0]] == [event[:2] for event in results[0][0]]  # type: ignore[index]
        assert same(one[1], results[0][1])  # type: ignore[index]
    return list(results[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", RECIPES)
def test_any_number_of_ranks_gives_the_same_bits(name: str) -> None:
    alone = ran(name, 1)
    rows = [event[2] for event in alone[0] if len(event) == 4]
    if name == "stops early, plateau":
        assert 3 < len(rows) < 100
    else:
        assert rows == [24, 24, 24, 7, 24, 24, 24, 7, 24, 24][: 8 if "callback" in name else 10]
    for world in WORLDS[1:]:
        found = ran(name, world)
        assert found[0] == alone[0]
        assert [digest(one) for one in found[1]] == [digest(one) for one in alone[1]]


@pytest.mark.parametrize("name", ["cnn, norms, momentum", "transformer, whole recipe"])
def test_a_run_goes_on_with_another_number_of_ranks(name: str) -> None:
    make, given = RECIPES[name]
    module = seeded(make)
    whole = ran(name, 1)[1]
    captured: Any = None
    for world, most in ((2, 3), (4, 3), (1, 10)):

        def rank_main(group: Group, captured: Any = captured, most: int = most) -> Any:
            fit = fitting(trainer(**given), module, group, captured)
            run = fit.run()
            made = 0
            for event in run:
                made += isinstance(event, Stepped)
                if made == most:
                    break
            found = fit.capture() if made == most else outcome(fit)
            run.close()
            return found

        captured = run_ranks(world, rank_main)[0]
    assert [digest(one) for one in captured[:2]] == [digest(one) for one in whole[:2]]
    assert same(captured[3]["optimizer"], whole[3]["optimizer"])


@pytest.mark.parametrize("objective", [cross_entropy, IGNORING])
def test_lanes_are_the_mean_over_the_rows(objective: Any) -> None:
    given: dict[str, Any] = {"optimizer_cls": "SGD", "optimizer_kwargs": {"lr": 0.5}, "max_iterations": 5}
    given["objective"] = objective
    module = nn.Linear(8, 3)
    plain = copy.deepcopy(module)
    fit = run_ranks(2, lambda group: _last_weights(trainer(**given), module, group))[0]
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    of = trainer(**{**given, "compute_kwargs": {"workers": 1, "lanes": 2}})

    cut, left = Cut(of, Alone()), 5
    while left:
        for step in cut:
            x, y = (torch.cat(parts) for parts in zip(*step.batches, strict=True))
            optimizer.zero_grad()
            objective(plain(x), y).backward()
            optimizer.step()
            left -= 1
            if not left:
                break
    assert not isinstance(fit, Exception), fit
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fit[name], value, rtol=1e-5, atol=1e-6)


def _last_weights(of: TorchTrainer, module: nn.Module, group: Group) -> dict[str, Tensor]:
    fit = fitting(of, module, group)
    list(fit.run())
    return state(fit.model)


def test_stop_on_one_rank_ends_all_after_the_next_step() -> None:
    def rank_main(group: Group) -> Any:
        fit, seen = fitting(trainer(), MLP, group), []
        for event in fit.run():
            seen.append((type(event), event.step))
            if event.step == 4 and group.rank == 1:
                fit.stop()
        return seen

    results = run_ranks(2, rank_main)
    assert results[0] == results[1]
    assert results[0][-2:] == [(Stepped, 5), (Validated, 5)]  # type: ignore[index]


class Fails(TorchTrainer):
    """It fails in one lane, or in the validation of one batch."""

    def compute_objective(self, model: TorchModel, batch: Any) -> Tensor:
        if "lane" in self.metric_values and len(batch[0]) == 1:  # type: ignore[operator]
            raise OwnError("of a lane")
        return super().compute_objective(model, batch)

    def compute_validation_objective(self, model: TorchModel, passed: Any) -> Tensor:
        loss = super().compute_validation_objective(model, passed)
        if "valid" in self.metric_values and torch.equal(passed.args[1], Cut.second):  # type: ignore[operator,attr-defined]
            raise OwnError("of a validation")
        return loss


class OwnError(Exception):
    """One that its users raise."""


class Broken(Cut):
    """It ends early, or with an error, on one rank."""

    kind = ""

    def __iter__(self) -> Iterator[LaneBatches]:
        for n, step in enumerate(super().__iter__()):
            if n == 2 and self.kind == "error":
                raise DataError("no further batch")
            if n == 2 and self.kind == "short":
                return
            yield step._replace(position=n + (self.kind == "other" and n == 2))


@pytest.mark.parametrize("kind", ["lane", "valid"])
def test_an_error_on_one_rank_is_raised_on_all(kind: str) -> None:
    def rank_main(group: Group) -> Any:
        fit = fitting(trainer(Fails, metric_values={kind: []}), MLP, group)
        Cut.second = fit._sets[""][0][1] if group.rank == 1 else getattr(Cut, "second", None)  # type: ignore[attr-defined,index]
        list(fit.run())

    results = run_ranks(4, rank_main, timeout_s=20)
    assert [type(one) for one in results] == [OwnError] * 4
    assert any("on rank" in note for one in results for note in getattr(one, "__notes__", []))


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [("error", DataError, "no further"), ("short", DataError, "different"), ("other", DataError, "different")],
)
def test_ranks_that_read_something_else_do_not_wait(kind: str, error: type[MongotorchError], words: str) -> None:
    def rank_main(group: Group) -> Any:
        fit = fitting(trainer(), MLP, group)
        made = Broken(fit.trainer, group)
        made.kind = kind if group.rank == 1 else ""
        fit._batches = made
        list(fit.run())

    results = run_ranks(2, rank_main, timeout_s=20)
    assert [type(one) for one in results] == [error] * 2
    assert all(words in str(one) for one in results)


def test_a_loss_that_is_not_finite_ends_all() -> None:
    def rank_main(group: Group) -> Any:
        fit = fitting(trainer(), MLP, group)
        fit._batches.x[5] = float("nan")  # type: ignore[attr-defined]
        list(fit.run())

    assert [type(one) for one in run_ranks(4, rank_main, timeout_s=20)] == [NonFiniteLossError] * 4


def test_a_rank_that_is_gone_is_an_error_of_the_others() -> None:
    def rank_main(group: Group) -> Any:
        fit = fitting(trainer(), MLP, group)
        for event in fit.run():
            if event.step == 2 and group.rank == 1:
                raise KeyError("gone")

    results = run_ranks(2, rank_main, timeout_s=20)
    assert [type(one) for one in results] == [WorkerLostError, KeyError]


def rank_process(rank: int, world: int, folder: str, name: str, most: int) -> None:
    """One rank in a process of its own; rank 0 goes on from a checkpoint that is there, and leaves one."""
    timeout = timedelta(seconds=30)
    dist.init_process_group("gloo", f"file://{folder}/meet{world}", timeout, rank=rank, world_size=world)
    checkpoint = Path(folder) / "checkpoint"
    captured = torch.load(checkpoint, weights_only=False) if checkpoint.exists() else None
    make, given = RECIPES[name]
    fit = fitting(trainer(**given), seeded(make), ProcessGroup(), captured)
    run = fit.run()
    fit.check()
    for event in run:
        if isinstance(event, Stepped) and event.step == most:
            break
    if rank == 0:
        torch.save(fit.capture() if most < 10 else outcome(fit), checkpoint)
    dist.barrier()
    run.close()
    fit._group.close()


def by_processes(worlds: list[tuple[int, int]], folder: Path, name: str, method: str = "spawn") -> list[Any]:
    """The outcome of a run that went on with other numbers of ranks, each up to a step."""
    start: Any = torch.multiprocessing.start_processes  # type: ignore[attr-defined]
    for world, most in worlds:
        start(rank_process, (world, str(folder), name, most), nprocs=world, start_method=method)
    return list(torch.load(folder / "checkpoint", weights_only=False))


def test_processes_give_the_bits_of_one(tmp_path: Path) -> None:
    name = "transformer, whole recipe"
    found = by_processes([(2, 100)], tmp_path, name, "fork")
    assert [digest(one) for one in found] == [digest(one) for one in ran(name, 1)[1]]


def test_parameters_that_cannot_go_with_lanes_are_refused() -> None:
    class Own(TorchTrainer):
        def take_step(self, model: Any, batch: Any, optimizers: Any) -> Tensor:
            raise NotImplementedError

    with pytest.raises(ParameterError, match="take_step is overridden"):
        trainer(Own)
    embedding = nn.Sequential(Rounded(), nn.Embedding(9, 3, sparse=True), Mean())
    given: dict[str, Any] = {"optimizer_cls": "SGD", "optimizer_kwargs": {"lr": 0.1}}
    with pytest.raises(ParameterError, match="sparse"):
        list(fitting(trainer(**given), embedding, Alone()).run())
    with pytest.raises(ParameterError, match="before its first batch"):
        list(fitting(trainer(), nn.Sequential(nn.LazyLinear(3)), Alone()).run())
    with pytest.raises(ParameterError, match="as many lanes as workers"):
        list(fitting(trainer(), nn.Sequential(nn.Linear(8, 3), nn.SyncBatchNorm(3)), thread_groups(2)[0]).run())
    with pytest.raises(ParameterError, match="possible are 1, 2, 4 workers"):
        fitting(trainer(), MLP, thread_groups(3)[0])


class Rounded(nn.Module):
    """Whole numbers from 0 to 8."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().clamp(max=8).long()


class Mean(nn.Module):
    """The mean over the second dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)
