"""Looks at everything that is stored, and says what is not what it should be.

Always: nothing is changed; nothing is unpickled; one broken thing does not hide another.
"""

from __future__ import annotations

import dataclasses
from typing import Any, final

from mongotorch.codecs import check_format
from mongotorch.errors import MongotorchError
from mongotorch.store.aliases import COLLECTION as ALIASES
from mongotorch.store.aliases import KIND as ALIAS
from mongotorch.store.aliases import Move
from mongotorch.store.artifacts import BUCKET, Artifacts
from mongotorch.store.components import COLLECTION, KIND
from mongotorch.store.failures import driver_errors
from mongotorch.store.trust import Trust


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verified:
    """What was looked at, and what was found.

    Attributes:
        blobs: How many blobs were read and hashed.
        nbytes: How many bytes that was.
        components: How many component documents were checked.
        aliases: How many moves of aliases were checked.
        problems: A sentence for each thing that is broken; empty is well.
    """

    blobs: int
    nbytes: int
    components: int
    aliases: int
    problems: tuple[str, ...]


@final
class Checker:
    """Verifies one database.

    Args:
        database: The driver's database.
        trust: Checks signatures; None checks none.
    """

    def __init__(self, database: Any, trust: Trust | None = None) -> None:
        self._files = database[f"{BUCKET}.files"]
        self._documents, self._moves = database[COLLECTION], database[ALIASES]
        self._artifacts = Artifacts(database)
        self._trust = trust or Trust()

    @driver_errors("verifying")
    def verify(self) -> Verified:
        """Read and hash every blob, check every component and its blobs, and the history of every alias."""
        problems: list[str] = []
        names = [file["filename"] for file in self._files.find({}, {"filename": 1})]
        nbytes = sum(self._read(name, problems) for name in names)
        there, components = set(names), 0
        for document in self._documents.find():
            components += 1
            self._check(document, there, problems)
        aliases = self._check_aliases(problems)
        return Verified(
            blobs=len(names), nbytes=nbytes, components=components, aliases=aliases, problems=tuple(problems)
        )

    def _read(self, name: str, problems: list[str]) -> int:
        try:
            return len(self._artifacts.get(name))
        except MongotorchError as error:
            problems.append(error.message)
            return 0

    def _check(self, document: dict[str, Any], there: set[str], problems: list[str]) -> None:
        try:
            check_format(document, KIND)
            self._trust.check(document, kind=KIND)
        except MongotorchError as error:
            problems.append(error.message)
        said = f"{document.get('type_id')} {document.get('identifier')!r} version {document.get('version')}"
        problems += [
            f"{said} ({document['_id']}) names the blob {name}, which is not there"
            for name in document.get("blobs", ())
            # A blob may have come after the list was read.
            if name not in there and not self._artifacts.has(name)
        ]

    def _check_aliases(self, problems: list[str]) -> int:
        count = 0
        newest: dict[str, dict[str, Any]] = {}
        for document in self._moves.find().sort("n", 1):
            count += 1
            name = f"{document.get('alias')!r} of {document.get('type_id')} {document.get('identifier')!r}"
            try:
                check_format(document, ALIAS)
                self._trust.check(document, kind=ALIAS)
                Move.from_document(document)
            except MongotorchError as error:
                problems.append(error.message)
            before = newest.get(name, {"n": 0})
            number = before["n"] + 1 if isinstance(before.get("n"), int) else None
            if document.get("n") != number or document.get("from") != before.get("to"):
                problems.append(f"alias {name}: a move is missing before {document['_id']}")
            newest[name] = document
        for name, head in newest.items():
            wanted = {"_id": head.get("to"), "type_id": head.get("type_id"), "identifier": head.get("identifier")}
            if head.get("to") is not None and self._documents.find_one(wanted, {"_id": 1}) is None:
                problems.append(f"alias {name} names {head.get('to')}, which is not there")
        return count
