"""What notebooks show of a datalayer and of the lists it gives: small tables, read when they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mongotorch.errors import MongotorchError
from mongotorch.mongo.driver_errors import redact
from mongotorch.notebook import ShownList, cut, html_pairs, html_table
from mongotorch.services.overview import Overview
from mongotorch.store import Move

_MOST_VERSIONS = 50


def datalayer_html(uri: str, overview: Overview) -> str:
    """The address without a password, the newest models, and how many jobs there are; what can be read of it.

    Args:
        uri: The address.
        overview: Reads what is stored.
    """
    pairs: list[tuple[str, Any]] = [("database", redact(uri))]
    try:
        counts = overview.runs(limit=1)["counts"]
        models = overview.models()["models"]
    except MongotorchError as error:  # a notebook shows a value also while its server is away
        return html_pairs("Datalayer", [*pairs, ("not readable", error.message)])
    pairs += [("jobs", ", ".join(f"{count:,} {status}" for status, count in sorted(counts.items())) or "none")]
    rows = [[model["identifier"], model["versions"], model["newest"], model["live"]] for model in models]
    shown = [["" if cell is None else cell for cell in row] for row in rows]
    return html_pairs("Datalayer", pairs) + html_table("models", ("name", "versions", "newest", "live"), shown)


def version_list(numbers: Sequence[int], type_id: str, identifier: str, overview: Overview) -> ShownList[int]:
    """The numbers of the versions of a name; a notebook shows when each was made, and its metrics."""

    def table() -> str:
        found = overview.versions(type_id, identifier, limit=_MOST_VERSIONS)
        rows = [
            (
                *(one["version"], _or_empty(one["created"]), ", ".join(one["aliases"])),
                *("yes" if one["job"] else "no", _or_empty(one["steps"]), _numbers(one["metrics"]), one["uuid"]),
            )
            for one in found
        ]
        columns = ("version", "created", "aliases", "trained", "steps", "metrics", "uuid")
        return html_table(f"{type_id} {identifier}: {len(numbers):,} versions", columns, rows)

    return ShownList(numbers, table)


def move_list(moves: Sequence[Move]) -> ShownList[Move]:
    """The moves of an alias; a notebook shows them as a table."""

    def table() -> str:
        rows = [
            (
                *(move.n, f"{move.when:%Y-%m-%d %H:%M:%S}"),
                *(_or_empty(move.from_version), _or_empty(move.to_version), move.who, move.why),
            )
            for move in moves
        ]
        return html_table("", ("n", "when", "from", "to", "who", "why"), rows)

    return ShownList(moves, table)


def job_list(jobs: Sequence[Any], records: Sequence[Mapping[str, Any]]) -> ShownList[Any]:
    """Jobs; a notebook shows what their documents said when they were listed."""

    def table() -> str:
        rows = [
            (
                *(record["_id"], f"{record['type_id']} {record['identifier']}", record["status"]),
                *(_or_empty((record.get("progress") or {}).get("step")), _error(record)),
            )
            for record in records
        ]
        return html_table(f"{len(records):,} jobs", ("job", "component", "status", "step", "error"), rows)

    return ShownList(jobs, table)


def _error(record: Mapping[str, Any]) -> str:
    error = record.get("error")
    return cut(f"{error.get('type')}: {error.get('message')}", 100) if error else ""


def _numbers(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def _or_empty(value: Any) -> Any:
    return "" if value is None else value
