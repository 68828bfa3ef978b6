"""Launchers: they call one function on several ranks, the processes that train one model together.

A launcher is a subclass of `Launcher` and an entry point in the group `mongotorch.launchers`. What a rank is given
are plain values; what it has to say it writes into the database; an error comes back as a description.

Guarantees: `run` returns when every rank has returned, or raises when one has not. Then no rank runs any more, and
none does after the process that launched them has ended, however that ended.
"""

from __future__ import annotations

import abc
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, final

from mongotorch.errors import SettingError, UnsupportedError

GROUP: Final = "mongotorch.launchers"
_BUILT_IN: Final = {
    "local": "mongotorch.jobs.launchers.base:LocalLauncher",
    "torchrun": "mongotorch.jobs.launchers.torchrun:TorchrunLauncher",
    "ray": "mongotorch.jobs.launchers.ray:RayLauncher",
    "joined": "mongotorch.jobs.launchers.joined:JoinedLauncher",
}


@final
@dataclass(frozen=True, kw_only=True)
class RankCall:
    """The function that each rank calls; it can be pickled.

    Attributes:
        function: Its importable name, `package.module:function`.
        arguments: Keyword arguments, the same for all ranks; plain values.
    """

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict, repr=False)  # may hold an address

    def __call__(self) -> None:
        """Call it in this process. Raises: whatever it raises."""
        imported(self.function)(**self.arguments)


class Launcher(abc.ABC):
    """Runs ranks.

    Attributes:
        name: By which the settings `launcher` and `compute` choose it.
        is_on_one_machine: Whether all ranks run on the machine of the process that launches them, and may be
            given its settings, the address of the database included.
    """

    name: ClassVar[str]
    is_on_one_machine: ClassVar[bool] = True

    def check(self) -> None:
        """Find out, before anything is begun, whether it can be used.

        Raises:
            UnsupportedError: Something that it needs is not installed.
            SettingError: A setting is missing, or cannot be used.
        """
        return

    def free(self, resources: Mapping[str, Any], *, device: str) -> int | None:  # noqa: ARG002
        """How many ranks there is room for at present; None: as many as are wanted.

        Args:
            resources: What one rank needs, by name.
            device: The type of device that a rank computes on, `cpu` or `cuda`.
        """
        return None

    @abc.abstractmethod
    def run(
        self,
        call: RankCall,
        *,
        workers: int,
        resources: Mapping[str, Any],
        device: str,
        check: Callable[[], None],
    ) -> None:
        """Call a function on every rank, and return when all have returned.

        Args:
            call: The function. `torch.distributed` finds rank and number of ranks in its environment.
            workers: How many ranks.
            resources: What one rank needs, by name.
            device: The type of device that a rank computes on, `cpu` or `cuda`.
            check: Called several times a second meanwhile; what it raises ends all ranks, and is raised.

        Raises:
            JobProcessError: The process of a rank ended before the function did.
            UnsupportedError: The launcher cannot run so many.
            Exception: What the function raised on the rank that raised first, with a note of where.
        """


@final
class LocalLauncher(Launcher):
    """Calls the function in this process: one rank."""

    name = "local"

    def free(self, resources: Mapping[str, Any], *, device: str) -> int | None:  # noqa: ARG002
        """One, always."""
        return 1

    def run(
        self,
        call: RankCall,
        *,
        workers: int,
        resources: Mapping[str, Any],  # noqa: ARG002
        device: str,  # noqa: ARG002
        check: Callable[[], None],
    ) -> None:
        """Call the function once; see `Launcher.run`."""
        if workers != 1:
            raise UnsupportedError(
                f"the launcher 'local' runs one process, and not {workers}; leave the setting `launcher` out, or "
                "name another one",
                setting="launcher",
            )
        check()
        call()


def launcher_named(name: str) -> Launcher:
    """The launcher of a name: a built-in one, or one that an installed package offers.

    Raises:
        SettingError: There is no such launcher; the message names those there are.
    """
    if name in _BUILT_IN:
        made: Launcher = imported(_BUILT_IN[name])()
        return made
    offered = {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}
    if name in offered:
        found: Launcher = offered[name].load()()
        return found
    known = ", ".join(sorted({*_BUILT_IN, *offered}))
    raise SettingError(f"launcher={name!r}: there is no such launcher; there are {known}", setting="launcher")


def is_launcher(name: str) -> bool:
    """Whether a launcher has this name."""
    return name in _BUILT_IN or any(entry.name == name for entry in importlib.metadata.entry_points(group=GROUP))


def imported(name: str) -> Any:
    """What an importable name `package.module:attribute` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
