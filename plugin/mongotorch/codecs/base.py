"""Defines a codec: it turns a value into a plain BSON record, with its bytes as blobs beside it, and back.

A codec neither knows where blobs live nor opens anything: bytes go out through `put` and come back, verified,
through `get`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, Self

Put = Callable[["bytes | memoryview"], str]
"""Stores a blob and returns its SHA-256 in hex; called from several threads at once, too."""
Get = Callable[[str], bytes]
"""From a SHA-256 in hex to the blob's bytes, verified."""


class Registry(Protocol):
    """The set of codecs that a codec belongs to, for storing the parts of a value."""

    def encode(self, value: Any, put: Put, *, codec: str | None = None, where: str = "value") -> Any:
        """What is stored for a value. Raises: CodecError."""

    def decode(self, record: Any, get: Get) -> Any:
        """The value of what `encode` gave. Raises: CodecError."""

    def claimed_by(self, part: Any) -> str | None:
        """The codec that stores whatever holds a part; None for most."""


class Codec(abc.ABC):
    """One way to store a value. A new one is a class and an entry point in `mongotorch.codecs`."""

    name: ClassVar[str]
    types: ClassVar[tuple[type, ...] | None] = None
    """The classes whose objects `handles` is asked about; None asks it about every value."""

    @abc.abstractmethod
    def handles(self, value: Any) -> bool:
        """Whether this codec is the default choice for a value."""

    @abc.abstractmethod
    def encode(self, value: Any, put: Put, *, where: str) -> dict[str, Any]:
        """The record of a value, without `_codec`.

        Args:
            value: What to store.
            put: Takes the bytes that go beside the record.
            where: Name of the value, for the path in an error.

        Raises:
            CodecError: The value cannot be stored; nothing was put.
        """

    @abc.abstractmethod
    def decode(self, record: Mapping[str, Any], get: Get) -> Any:
        """The value of a record.

        Raises:
            CodecError: The record cannot be read here.
        """

    def claims(self, part: Any) -> bool:  # noqa: ARG002
        """Whether what holds this part, at any depth, is stored by this codec rather than pickled."""
        return False

    def bound(self, registry: Registry) -> Self:  # noqa: ARG002
        """The codec as part of a registry; itself, unless it stores the parts of a value through the registry."""
        return self
