"""Makes the gradients of one step out of its lanes: one after the other on each rank, then one sum over all ranks.

What else the ranks have to know of a step travels at the end of the same tensor: rows, the loss, whether one was
asked to stop, has failed or has no further batch, and the buffers that lane 0 has changed.

Guarantees: gradients, loss and buffers have the same bits on any number of ranks. Each lane starts with the
buffers that the step began with, and with generators that depend on (seed, step, lane) alone. All ranks decide
alike: where one fails, all raise its error, and none waits.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, Protocol, final

import numpy as np
import torch
from torch import Tensor, nn

from mongotorch.errors import DataError, ParameterError
from mongotorch.train.generators import waiting
from mongotorch.train.parallel.group import Group, portable, raise_first, tree_sum
from mongotorch.train.parallel.lanes import Lanes

# What the header holds, before the number of lanes in which each parameter has a gradient.
_ROWS, _WEIGHT, _PARTIAL, _STOPS, _FAILED, _ENDED, _POSITION, _CHANGED = range(8)
_NUMBERS: Final = 8

Backward = Callable[[int, Any, float], tuple[Tensor, float]]
"""From the number of a lane, its batch and its share of the rows to the loss and the share of it that counts."""


def seed_generators(*parts: int | str) -> None:
    """Let torch's, numpy's and Python's global generators start where these parts say."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest) >> 1
    if torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available():
        torch.manual_seed(seed)
    else:  # the same for the CPU, without stack traces for devices that are not there
        torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@final
@dataclass(kw_only=True)
class _Sum:
    """The gradients of some lanes, already weighed, with the loss behind them, and the header."""

    gradients: list[Tensor | None]
    header: Tensor

    def add(self, other: _Sum) -> _Sum:
        """This sum with the other one added; neither is used any more."""
        both = [
            (a, b) for a, b in zip(self.gradients, other.gradients, strict=True) if a is not None and b is not None
        ]
        if both:
            torch._foreach_add_([a for a, _ in both], [b for _, b in both])
        merged = [b if a is None else a for a, b in zip(self.gradients, other.gradients, strict=True)]
        return _Sum(gradients=merged, header=self.header.add_(other.header))


@final
class _Buffers:
    """The buffers of modules, as they are when a step begins.

    Args:
        modules: The modules, by names of their own.

    Attributes:
        known: The names of the buffers that lane 0 was seen to change.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self._modules = [
            (f"{outer}.{inner}", module)
            for outer, root in modules.items()
            for inner, module in root.named_modules()
        ]
        self.known: list[str] = []
        self._owners: dict[str, tuple[nn.Module, str]] = {}
        self._buffers: list[Tensor] = []
        self._kept: list[Tensor] = []

    def begin(self) -> None:
        """Keep them."""
        found = [
            (f"{path}.{name}", module, name, buffer)
            for path, module in self._modules
            for name, buffer in module._buffers.items()
            if buffer is not None and not _overlaps(buffer)
        ]
        if [id(buffer) for *_, buffer in found] != [id(buffer) for buffer in self._buffers]:
            self._owners = {key: (module, name) for key, module, name, _ in found}
            self._buffers = [buffer for *_, buffer in found]
            self._kept = [buffer.detach().clone() for buffer in self._buffers]
        elif found:
            _copy(self._kept, self._buffers)

    def now(self) -> dict[str, Tensor]:
        """Copies of what they are."""
        return {key: module._buffers[name].detach().clone() for key, (module, name) in self._owners.items()}  # type: ignore[union-attr]

    def put_back(self) -> None:
        """Set them to what was kept."""
        for (module, name), buffer in zip(self._owners.values(), self._buffers, strict=True):
            module._buffers[name] = buffer  # a module may have put another one there
        if self._buffers:
            _copy(self._buffers, self._kept)

    def put(self, values: dict[str, Tensor]) -> None:
        """Set some of them."""
        buffers = dict(zip(self._owners, self._buffers, strict=True))
        for key, (module, name) in self._owners.items():
            module._buffers[name] = buffers[key]
        if values:
            _copy([buffers[key] for key in values], list(values.values()))

    def _first(self) -> dict[str, Tensor]:
        return dict(zip(self._owners, self._kept, strict=True))

    def changed(self, values: dict[str, Tensor]) -> list[str]:
        """The names of those that are not what was kept, without the known ones."""
        first = self._first()
        return [
            key for key, value in values.items() if key not in self.known and not _same_bytes(value, first[key])
        ]

    def as_numbers(
        self, values: dict[str, Tensor] | None, dtype: torch.dtype, device: torch.device
    ) -> list[Tensor]:
        """The bytes of the known ones as numbers, which a sum with zeros does not change; zeros without values."""
        kept = [self._first()[key] for key in self.known]
        if values is None:
            return [torch.zeros(one.numel() * one.element_size(), dtype=dtype, device=device) for one in kept]
        return [_bytes(values[key]).to(device=device, dtype=dtype) for key in self.known]

    def from_numbers(self, numbers: list[Tensor]) -> dict[str, Tensor]:
        """The known ones out of what `as_numbers` gave."""
        found, first = dict[str, Tensor](), self._first()
        for key, one in zip(self.known, numbers, strict=True):
            kept = first[key]
            found[key] = one.to(torch.uint8).to(kept.device).view(kept.dtype).view(kept.shape)
        return found


def _copy(into: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_copy_(into, values)


def _overlaps(buffer: Tensor) -> bool:
    """Whether several elements are one in memory, as after `expand`: nothing can change it in place."""
    return any(not step and size > 1 for step, size in zip(buffer.stride(), buffer.shape, strict=True))


def _bytes(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


def _same_bytes(first: Tensor, second: Tensor) -> bool:
    return torch.equal(_bytes(first), _bytes(second))


class LaneRows(Protocol):
    """What a rank has of a step: see `MicroBatches`."""

    @property
    def batches(self) -> Sequence[Any]:
        """The batches of its lanes; None for an empty one."""

    @property
    def rows(self) -> Sequence[int]:
        """Samples in each; in all lanes fewer than planned where documents were left out."""

    @property
    def planned(self) -> int:
        """Documents of the whole step."""

    @property
    def position(self) -> int:
        """A number below 4096 that all ranks have alike where they have read the same documents."""


@final
class LaneStep:
    """Makes the gradients of the steps of one run on one rank.

    Args:
        lanes: How a step is cut.
        group: The ranks.
        seed: The trainer's.
        modules: The modules whose buffers a step may change, by names of their own.

    Attributes:
        rows: Samples of the last step, in all lanes.
        is_empty: Whether it had none, because all were left out.
        is_stopped: Whether some rank was asked to stop before the last step.
    """

    def __init__(
        self,
        lanes: Lanes,
        group: Group,
        *,
        seed: int,
        modules: dict[str, nn.Module],
    ) -> None:
        self._lanes, self._group, self._seed = lanes, group, seed
        self._numbers = lanes.mine(group.rank, group.world)
        self._buffers = _Buffers(modules)
        self._parameters: Sequence[nn.Parameter] = ()
        self._dtype, self._device = torch.float32, torch.device("cpu")
        self.rows, self.is_empty, self.is_stopped = 0, False, False

    def begin(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take in what is trained; before the first step."""
        self._parameters = parameters
        is_double = any(one.dtype in (torch.float64, torch.complex128) for one in parameters)
        self._dtype = torch.float64 if is_double else torch.float32
        self._device = parameters[0].device if parameters else torch.device("cpu")

    def make(self, number: int, step: LaneRows, backward: Backward, *, stops: bool) -> Tensor:
        """Give the parameters the gradients of a step; the loss, the mean over all of its rows.

        Args:
            number: That of the step.
            step: The batches of the lanes of this rank, None for an empty one.
            backward: Adds the gradient of one lane to those of the parameters.
            stops: Whether this rank was asked to stop.

        Raises:
            DataError: The ranks have read different documents.
            ParameterError: A gradient is sparse.
            MongotorchError, Exception: What a lane raised, on this rank or on another one.
        """
        self._buffers.begin()
        final: dict[str, Tensor] | None = None

        def made(lane: int) -> _Sum:
            nonlocal final
            seed_generators(self._seed, number, lane)
            at = lane - self._numbers.start
            found = self._lane(lane, step.batches[at], step.rows[at], step.planned, backward)
            if lane == 0:
                final = self._buffers.now()
            self._buffers.put_back()
            return found

        error: Exception | None = None
        try:
            total = tree_sum(made, self._numbers.start, self._numbers.stop, _Sum.add)
        except Exception as raised:
            if self._group.world == 1:
                raise
            error, total = raised, self._nothing()
        seed_generators(self._seed, number, "step")
        total.header[_STOPS] += stops
        total.header[_POSITION] += step.position
        total = self._summed(total, final, error=error)
        self._check_alike(total.header, step.position)
        if final is not None:
            self._buffers.put(final)
        return self._finish(total, step.planned)

    def end_epoch(self) -> None:
        """Find out whether all ranks are at the end of the epoch. Raises: DataError, and what `make` raises."""
        if self._group.world > 1:
            total = self._nothing()
            total.header[_ENDED] += 1
            self._buffers.begin()
            header = self._summed(total, None).header
            if header[_ENDED] != self._group.world:
                raise self._differ()

    def fail(self, error: Exception) -> NoReturn:
        """Let all ranks raise an error that only this one has. Raises: Exception, the error."""
        if self._group.world > 1:
            self._buffers.begin()
            self._summed(self._nothing(), None, error=error)
        raise error

    def _lane(self, number: int, batch: Any, rows: int, planned: int, backward: Backward) -> _Sum:
        """The gradients of a lane, taken from the parameters.

        Torch could add them to those of the lane before; but where a step calls `backward()` several times, these
        would be added up one by one, and in another order than on several ranks.
        """
        made = self._nothing()
        if not rows:
            return made
        for parameter in self._parameters:
            parameter.grad = None
        loss, counted = backward(number, batch, rows / planned)
        weight = rows / planned * counted
        numbers = [0.0] * len(made.header)
        for at, parameter in enumerate(self._parameters):
            if parameter.grad is not None:
                numbers[_NUMBERS + at] = 1.0
                made.gradients[at] = self._taken(parameter)
        lost = torch.zeros(1, dtype=self._dtype, device=self._device)
        made.gradients[-1] = loss.detach().reshape(1).to(lost) * weight if counted else lost
        numbers[_ROWS], numbers[_WEIGHT], numbers[_PARTIAL] = rows, weight, counted != 1.0
        made.header = torch.tensor(numbers, dtype=self._dtype)
        return made

    def _taken(self, parameter: nn.Parameter) -> Tensor:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None or gradient.layout != torch.strided:
            raise ParameterError(
                "a gradient is sparse, and lanes add up dense ones; use sparse=False in the embedding, or leave "
                "out workers and lanes",
                field="compute_kwargs",
            )
        real = torch.view_as_real(gradient) if gradient.is_complex() else gradient
        return real if real.dtype == self._dtype else real.to(self._dtype)

    def _nothing(self) -> _Sum:
        header = torch.zeros(_NUMBERS + len(self._parameters), dtype=self._dtype)
        return _Sum(gradients=[None] * (len(self._parameters) + 1), header=header)

    def _summed(self, total: _Sum, final: dict[str, Tensor] | None, *, error: Exception | None = None) -> _Sum:
        """The sum over all ranks, with the buffers of lane 0 in place. Raises: what a rank has failed with."""
        if self._group.world == 1:
            return total
        fresh = self._buffers.changed(final) if final is not None else []
        total.header[_CHANGED] += len(fresh)
        total.header[_FAILED] += error is not None
        parts = self._parts(total, final)
        with torch.no_grad(), waiting():
            self._group.sum(parts)
        total, numbers = self._total(parts)
        if total.header[_FAILED]:
            with waiting():
                errors = self._group.gather(portable(error))
            raise_first(self._group, error, errors)
        if not total.header[_ENDED]:
            self._buffers.put(self._buffers.from_numbers(numbers))
        if total.header[_CHANGED]:
            with waiting():
                values = self._group.share(
                    {key: value.cpu() for key, value in (final or {}).items() if key in fresh}
                )
            self._buffers.put(values)
            self._buffers.known += list(values)
        return total

    def _parts(self, total: _Sum, final: dict[str, Tensor] | None) -> list[Tensor]:
        """All of it as tensors of shape (n,): the gradients themselves, where they lie in one piece of memory."""
        sizes = [one.numel() * (2 if one.is_complex() else 1) for one in self._parameters]
        parts = [
            torch.zeros(size, dtype=self._dtype, device=self._device)
            if part is None
            else part.detach().reshape(-1)
            for part, size in zip(total.gradients, [*sizes, 1], strict=True)
        ]
        buffers = self._buffers.as_numbers(final, self._dtype, self._device)
        return [*parts, total.header.to(self._device), *buffers]

    def _total(self, parts: list[Tensor]) -> tuple[_Sum, list[Tensor]]:
        """What `_parts` was made of, with zeros for what no lane had, and the numbers of the buffers."""
        gradients: list[Tensor | None] = [
            part.view(*one.shape, *((2,) if one.is_complex() else ()))
            for one, part in zip(self._parameters, parts, strict=False)
        ]
        count = len(self._parameters)
        return _Sum(gradients=[*gradients, parts[count]], header=parts[count + 1].cpu()), parts[count + 2 :]

    def _check_alike(self, header: Tensor, position: int) -> None:
        world = self._group.world
        if header[_ENDED] or header[_POSITION] != world * position:
            raise self._differ()

    def _differ(self) -> DataError:
        return DataError(
            f"the {self._group.world} workers have read different documents: some were deleted, or changed so "
            "that they match no longer, while an epoch was read; start the run again, or train on a copy"
        )

    def _finish(self, total: _Sum, planned: int) -> Tensor:
        """Give the parameters the gradients of a sum; the loss."""
        header: list[float] = total.header.tolist()
        self.rows, self.is_stopped = int(header[_ROWS]), header[_STOPS] > 0
        self.is_empty = not self.rows
        weight = header[_WEIGHT]
        is_whole = self.rows == planned and not header[_PARTIAL]
        found = [one for one in total.gradients if one is not None]
        if not is_whole and weight:
            torch._foreach_div_(found, weight)
        for at, parameter in enumerate(self._parameters):
            lanes, gradient = int(header[_NUMBERS + at]), total.gradients[at]
            if not lanes or gradient is None:
                parameter.grad = None
                continue
            if lanes < self._lanes.lanes:
                gradient.add_(0.0)  # no lane's zero has a sign then: adding nothing and adding zero are the same
            parameter.grad = _like(gradient, parameter)
        loss = total.gradients[-1]
        if loss is None or (not weight and not self.is_empty):
            return torch.full((), float("nan"), device=self._device)
        return loss.reshape(()).clone()


def _like(gradient: Tensor, parameter: nn.Parameter) -> Tensor:
    """A gradient in the dtype and layout of its parameter, so that a norm of it adds up in the same order."""
    value = torch.view_as_complex(gradient.contiguous()) if parameter.is_complex() else gradient
    if value.dtype == parameter.dtype and value.stride() == parameter.stride() and value.storage_offset() == 0:
        return value
    return torch.empty_like(parameter).copy_(value)
