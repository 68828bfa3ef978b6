"""Leaves out the documents that do not fit: that lack a field, or hold a value of another dtype or shape.

What fits is decided for a whole run (`Form`, and the dtypes of the run), so it does not depend on which documents
are read together.

Guarantees: documents that fit come out as they do without the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mongotorch.data.decode import Column, Columns, Reply, build, convert, decode, without_missing
from mongotorch.errors import DtypeError, FieldMissingError

Form = tuple[Any, ...]
"""What the values of a field that becomes a tensor have in common: the dtype of stored arrays ("" for numbers and
lists of them), and then their shape."""


def decode_fitting(
    replies: Sequence[Reply],
    paths: Sequence[str],
    *,
    defaults: Mapping[str, Any],
    dtypes: Mapping[str, str],
    forms: Mapping[str, Form],
) -> Columns:
    """Decode the documents that fit into columns of the run's dtypes; `skipped` and `why` say what was left out.

    Args:
        replies: BSON documents.
        paths: Dotted paths of the fields to read.
        defaults: Values of paths that a document lacks, or has as null.
        dtypes: Of fields that hold numbers.
        forms: Of fields that become tensors.

    Raises:
        DataError: The bytes are not BSON documents.
    """
    try:
        columns = decode(replies, paths, defaults=defaults)
        if fits(columns, forms):
            return columns.typed(dtypes)
        skipped, why = 0, ""
    except DtypeError:
        skipped, why = 0, ""
    except FieldMissingError as error:
        kept, skipped = without_missing(replies, paths, defaults=defaults)
        columns, why = decode(kept, paths, defaults=defaults), str(error)
    return _fitting(columns, dtypes, forms, skipped, why)


def fits(columns: Columns, forms: Mapping[str, Form]) -> bool:
    """Whether all values of these fields have their form."""
    return all(form_of(columns[path]) == form for path, form in forms.items()) or not len(columns)


def form_of(column: Column) -> Form | None:
    """The form that all values of a column have; None where they have none, or not the same."""
    if column.kind not in ("number", "array") or isinstance(column.data, list):
        return None
    return ("" if column.plain else column.dtype, *column.data.shape[1:])


def common_forms(columns: Columns) -> dict[str, Form]:
    """The form that most values of each field have, not counting null; a field of other values has none."""
    found: dict[str, Form] = {}
    for path in columns.paths:
        column = columns[path]
        form = form_of(column)
        counts = Counter({form: 1}) if form is not None else Counter(map(_form_of_value, _not_null(column)))
        most = counts.most_common(1)
        if most and (chosen := most[0][0]) is not None:
            found[path] = chosen
    return found


def _not_null(column: Column) -> Iterator[Any]:
    return (value for value in column.values() if value is not None)


def _form_of_value(value: Any) -> Form | None:
    return ("", 0) if value == [] else form_of(build([value]))


def _fitting(
    columns: Columns, dtypes: Mapping[str, str], forms: Mapping[str, Form], skipped: int, why: str
) -> Columns:
    """The rows that fit, in the dtypes of the run."""
    unfit = np.zeros(len(columns), np.bool_)
    for path in columns.paths:
        column = columns[path]
        for row, reason in (*_other_forms(column, forms.get(path)), *_other_dtypes(column, dtypes.get(path))):
            if not why:
                why = f"field {path!r} of document {columns.ids[row]!r} {reason}"
            unfit[row] = True
    left = columns.take(np.flatnonzero(~unfit)) if unfit.any() else columns
    return replace(left.typed(dtypes), skipped=skipped + int(np.count_nonzero(unfit)), why=why)


def _other_forms(column: Column, form: Form | None) -> Iterator[tuple[int, str]]:
    if form is None or form_of(column) == form:
        return
    for row, value in enumerate(column.values()):
        own = _form_of_value(value)
        if own != form:
            yield row, f"holds {_shown(own, value)} where most documents have {_shown(form)}"


def _shown(form: Form | None, value: Any = None) -> str:
    if form is None:
        names = {type(None): "null", list: "a list that is no tensor"}
        return names.get(type(value), type(value).__name__)
    dtype, *shape = form
    if not shape:
        return "a number"
    return f"{dtype or 'numbers'} of shape {tuple(shape)}"


def _other_dtypes(column: Column, dtype: str | None) -> Iterator[tuple[int, str]]:
    start = 0
    while dtype is not None and start < len(column):
        _, misfit = convert(column.slice(start, len(column)), dtype)
        if misfit is None:
            return
        yield start + misfit, f"is not exact in the dtype that the field has for the whole run ({dtype})"
        start += misfit + 1
