"""An error in a `transform` or a `collate_fn` names the document, here and in worker processes."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from tests.helpers import fill, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mongotorch import Datalayer
from mongotorch.errors import SignatureError, TransformError

WORKERS = pytest.mark.parametrize("workers", [0, 1, 2])


class OddError(Exception):
    """An error of a user, which cannot be rebuilt from a pickle."""

    def __init__(self, what: str, more: int) -> None:
        super().__init__(f"{what} {more}")


def fails_at_17(x: Tensor, n: int) -> tuple[Tensor, int]:
    if n == 17:
        raise KeyError("colour")
    return x, n


def fails_late(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    return fails_at_17(x, n)[0], x[:3]


def fails_oddly(x: Tensor, n: int) -> tuple[Tensor, int]:
    if n == 17:
        raise OddError("what", 3)
    return x, n


def ends(x: Tensor, n: int) -> tuple[Tensor, int]:
    if n == 17:
        raise StopIteration
    return x, n


def forgets(x: Tensor, n: int) -> tuple[Tensor, int] | None:
    return None if n == 17 else (x, n)


def takes_one(x: Tensor) -> Tensor:
    return x


def read(db: Datalayer, **given: Any) -> list[Any]:
    workers = given.pop("workers", 0)
    options = {"num_workers": workers} if workers else {}
    with db.stream(fill(db), key=("x", "n"), batch_size=8, shuffle=True, **options, **given) as stream:
        return list(stream)


@WORKERS
@pytest.mark.parametrize(
    ("transform", "text"),
    [(fails_at_17, "KeyError: 'colour'"), (fails_oddly, "OddError: what 3"), (ends, "StopIteration")],
)
def test_what_a_transform_raises_names_the_document(
    db: Datalayer, workers: int, transform: Any, text: str
) -> None:
    with pytest.raises(TransformError, match=f"transform failed for document 17: {text}") as caught:
        read(db, transform=transform, workers=workers)
    assert (caught.value.document_id, caught.value.field) == (17, "transform")
    if transform is not fails_oddly or not workers:
        assert type(caught.value.__cause__).__name__ == text.split(":")[0]


@WORKERS
def test_a_transform_that_forgets_to_return_is_told_so(db: Datalayer, workers: int) -> None:
    with pytest.raises(TransformError, match="transform returned None for document 17; let it return the sample"):
        read(db, transform=forgets, workers=workers)


def whole(samples: list[Any]) -> int:
    return len([sample for sample in samples if sample is not None])


def test_a_collate_fn_may_leave_out_what_a_transform_gave_none_for(db: Datalayer) -> None:
    assert sum(read(db, transform=forgets, collate_fn=whole)) == 119


def breaks(samples: list[Any]) -> Any:
    return torch.stack([sample["x"] for sample in samples])


@WORKERS
def test_what_a_collate_fn_raises_names_the_batch(db: Datalayer, workers: int) -> None:
    with pytest.raises(
        TransformError, match=r"collate_fn failed for the batch of 8 document\(s\) from \d+ to \d+: TypeEr"
    ):
        read(db, collate_fn=breaks, workers=workers)


@WORKERS
def test_a_transform_that_takes_something_else_is_told_what_it_is_given(db: Datalayer, workers: int) -> None:
    with pytest.raises(SignatureError, match=r"transform takes \(x\), and signature '\*args' gives it 2 argument"):
        read(db, transform=takes_one, workers=workers)


def test_a_users_own_loader_says_the_same(db: Datalayer, uri: str) -> None:
    with db.stream(fill(db), key=("x", "n"), batch_size=8, transform=fails_at_17) as stream:
        loader = DataLoader(stream, batch_size=None, num_workers=0)
        with pytest.raises(TransformError, match="document 17"):
            list(loader)


def test_a_run_fails_with_the_document(db: Datalayer) -> None:
    job = db.apply(trainer(fill(db), key=("x", "n"), objective=nn.functional.l1_loss, transform=fails_late))
    with pytest.raises(TransformError, match="document 17"):
        job.result()
    assert job.error is not None
    assert (job.error["type"], job.error["document_id"]) == ("TransformError", 17)
    assert "KeyError" in job.error["traceback"]


def test_an_error_crosses_processes_with_its_notes_and_its_cause() -> None:
    error = TransformError("it failed", document_id=1, field="transform")
    error.__cause__ = KeyError("colour")
    error.add_note("in training")
    found = pickle.loads(pickle.dumps(error))
    assert (str(found), found.document_id, found.field, found.__notes__) == (
        "it failed",
        1,
        "transform",
        ["in training"],
    )
    assert repr(found.__cause__) == "KeyError('colour')"
    error.__cause__ = OddError("what", 3)
    assert pickle.loads(pickle.dumps(error)).__cause__ is None
