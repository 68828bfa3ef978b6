"""The streams of all shards of a select, as the ranks of a run open them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from mongotorch import Datalayer, Query
from mongotorch.data import Stream


@contextmanager
def opened_shards(
    db: Datalayer, select: Query, world: int, reading: Mapping[str, Any], given: Mapping[str, Any]
) -> Iterator[list[Stream]]:
    """A stream for each shard; `reading` goes through `db.stream`, `given` is what only a spec can say."""
    connection = db._connection
    with ExitStack() as opened:
        first = opened.enter_context(db.stream(select, key=("x", "n"), batch_size=1, **reading))
        made = [
            Stream(
                connection.opener,
                replace(first.spec, **given, shard=(rank, world)),
                database=connection.database,
            )
            for rank in range(world)
        ]
        for one in made:
            opened.callback(one.close)
        yield made
