"""The command `predict`: with a stored model, an input from the command line or the documents of a collection."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mongotorch.cli.output import Uri, one_of, opened
from mongotorch.cli.versions import KINDS, Identifier, Kind
from mongotorch.errors import MongotorchError

if TYPE_CHECKING:
    from mongotorch.datalayer import Datalayer


def predict(
    type_id: Kind,
    identifier: Identifier,
    data: Annotated[
        str | None, typer.Argument(help="The input as JSON, such as '[[0.1, 0.2]]'; - reads it from stdin.")
    ] = None,
    version: Annotated[int | None, typer.Option(help="The version; without it, the live one.")] = None,
    batch: Annotated[bool, typer.Option(help="The JSON is a list of inputs, predicted together.")] = False,
    integers: Annotated[bool, typer.Option(help="Lists of whole numbers stay whole: int64, for ids.")] = False,
    collection: Annotated[
        str | None, typer.Option(help="In place of an input: the collection whose documents are predicted.")
    ] = None,
    into: Annotated[str | None, typer.Option(help="The field in which each document gets its prediction.")] = None,
    where: Annotated[str, typer.Option("--filter", help="Which documents: a MongoDB filter as JSON.")] = "{}",
    key: Annotated[
        str | None, typer.Option(help="The fields of an input: a name, or JSON; without it, those of the trainer.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Documents that this version has predicted, too.")] = False,
    workers: Annotated[int, typer.Option(help="How many processes predict documents together.")] = 1,
    uri: Uri = None,
) -> None:
    """Predict with a stored model, and print the output as JSON. Lists of numbers become float32 tensors.

    A JSON object gives the model its arguments by name. With --collection and --into, documents are predicted, and
    each prediction is written into its document.
    """
    if (data is None) == (collection is None) or (collection is None) != (into is None):
        raise typer.BadParameter("give an input as JSON, or --collection and --into")
    given = None if data is None else _json(_text_of(data), "the input")
    condition, fields = _json(where, "--filter"), _fields(key)
    if not isinstance(condition, dict):
        raise typer.BadParameter("--filter is a JSON object, such as '{\"labelled\": false}'")
    with opened(uri) as db:
        one_of("kind", type_id, {*KINDS, *db.show()})
        one_of(type_id, identifier, db.show(type_id))
        if collection is None:
            _predict_input(db, (type_id, identifier, version), given, batch=batch, integers=integers)
            return
        one_of("collection", collection, db.overview.collections()["collections"])
        found = db.predict(
            type_id,
            identifier,
            version,
            select=db[collection].find(condition),
            into=str(into),
            key=fields,
            force=force,
            workers=workers,
        )
    left_out = f"; {found.skipped:,} left out ({found.why})" if found.skipped else ""
    gone = f"; {found.gone:,} were deleted meanwhile" if found.gone else ""
    nothing = (
        "; no other document matches, or this version has predicted them already" if not found.written else ""
    )
    typer.echo(
        f"model {found.identifier} version {found.version} predicted {found.written:,} documents of "
        f"{found.collection} into {found.into}{nothing}{left_out}{gone}"
    )


def _predict_input(
    db: Datalayer, name: tuple[str, str, int | None], given: Any, *, batch: bool, integers: bool
) -> None:
    model = db.load(*name)
    if not hasattr(model, "predict"):
        raise typer.BadParameter(f"a {name[0]} does not predict")
    if batch and not isinstance(given, list):
        raise typer.BadParameter("with --batch the input is a JSON list of inputs")
    inputs = [_input(one, integers) for one in given] if batch else _input(given, integers)
    try:
        found = model.predict_batches(inputs) if batch else model.predict(inputs)
    except MongotorchError:
        raise
    except Exception as error:  # noqa: BLE001 - the model's own code, on what somebody typed
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        hint = "; with --integers whole numbers stay whole" if "Long" in why and not integers else ""
        typer.echo(f"{name[0]} {name[1]} does not take this input: {why}{hint}", err=True)
        raise typer.Exit(1) from None
    typer.echo(json.dumps(_plain(found)))


def _text_of(data: str) -> str:
    return typer.get_text_stream("stdin").read() if data == "-" else data


def _json(text: str, what: str) -> Any:
    """The value of a JSON text; MongoDB's extended JSON stands for dates and ids."""
    from bson import json_util

    try:
        return json_util.loads(text) if what.startswith("--") else json.loads(text)
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(f"{what} is no JSON: {error}") from error


def _fields(key: str | None) -> Any:
    return _json(key, "--key") if key is not None and key.lstrip().startswith(("[", "{")) else key


def _input(value: Any, integers: bool) -> Any:
    """A JSON value as a model takes it."""
    import torch

    if isinstance(value, dict):
        return {name: _input(part, integers) for name, part in value.items()}
    if isinstance(value, list):
        try:
            floats = torch.tensor(value, dtype=torch.float32)
            whole = torch.tensor(value) if integers else floats
        except (TypeError, ValueError, RuntimeError):  # text, or lists of unequal length
            return [_input(part, integers) for part in value]
        return whole if whole.dtype == torch.int64 else floats
    return value


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such number
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
