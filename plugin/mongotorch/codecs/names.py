"""What can be imported by name is stored as that name, not as bytes.

Guarantees: a name is given only where importing it gives the very same object again; what mongotorch itself
offers has its public name; `__main__` and what is local to a function have no name.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, final

from mongotorch.codecs.base import Codec, Get, Put
from mongotorch.codecs.public_names import current_name, stored_name
from mongotorch.errors import CodecError

SPAWNED_MAIN = "__mp_main__"
"""What multiprocessing calls the main script in a spawned process; importable nowhere else."""


def name_of(value: Any) -> str | None:
    """The dotted name by which a function or class can be imported; None where there is none."""
    module, qualname = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str) or not callable(value):
        return None
    if module in ("__main__", SPAWNED_MAIN) or "<" in qualname:
        return None
    try:
        found = resolve(f"{module}.{qualname}")
    except CodecError:
        return None
    return ".".join(stored_name(module, qualname)) if found is value else None


def resolve(name: str) -> Any:
    """What a dotted name stands for, also one that an older release stored.

    Raises:
        CodecError: It cannot be imported here.
    """
    parts = current_name(name).split(".")
    cause: Exception | None = None
    for length in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except Exception as error:  # noqa: BLE001 - importing runs foreign code, which can raise anything
            cause = cause or error
            continue
        try:
            for part in parts[length:]:
                found = getattr(found, part)
        except AttributeError:
            continue
        return found
    raise CodecError(f"{name!r} cannot be imported here; install or put on the path what defines it") from cause


@final
class NameCodec(Codec):
    """Functions and classes that can be imported, as their name."""

    name = "name"

    def handles(self, value: Any) -> bool:
        """Whether the value can be imported by name."""
        return name_of(value) is not None

    def encode(self, value: Any, put: Put, *, where: str) -> dict[str, Any]:  # noqa: ARG002
        """The name. Raises: CodecError when it has none."""
        name = name_of(value)
        if name is None:
            raise CodecError(f"{where} cannot be imported by name; leave the codec to its default", field=where)
        return {"name": name}

    def decode(self, record: Mapping[str, Any], get: Get) -> Any:  # noqa: ARG002
        """What the name stands for. Raises: CodecError when it cannot be imported here."""
        return resolve(record["name"])
