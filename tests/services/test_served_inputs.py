"""A model with `preprocess="trainer"` gets its inputs as the validations of its trainer make them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import net, run_elsewhere, trainer
from torch import Tensor, nn

from mongotorch import Datalayer, MongotorchError, Query, TorchModel
from mongotorch.errors import ParameterError, ShapeError, SignatureError, TransformError, TrustError

cross_entropy = nn.functional.cross_entropy
SELECT = Query.find("texts")


def numbers(text: str) -> Tensor:
    """Four numbers of a text."""
    return torch.tensor([float(len(text)), *(float(text.count(letter)) for letter in "abc")])


def noisy(text: str, label: Any) -> Any:
    return numbers(text) + torch.randn(4), label


def plain(text: str, label: Any) -> Any:
    return numbers(text), label


def texts(db: Datalayer, count: int = 40) -> None:
    db["texts"].insert_many({"_id": n, "text": "abc"[n % 3] * (n % 7 + 1), "label": n % 3} for n in range(count))


def served(**given: Any) -> Any:
    """A trainer of texts whose model takes its inputs from it."""
    own = given.pop("model", {})
    model = own if isinstance(own, TorchModel) else TorchModel("m", object=net(), preprocess="trainer", **own)
    options: dict[str, Any] = {
        "key": ("text", "label"),
        "transform": noisy,
        "valid_transform": plain,
        "objective": cross_entropy,
        "max_iterations": 3,
        "validation_interval": 3,
        "model": model,
    }
    return trainer(SELECT, **{**options, **given})


def test_a_published_model_takes_what_the_documents_hold(db: Datalayer) -> None:
    texts(db)
    model = db.apply(served()).result()
    expected = [model.object(numbers(text)[None])[0].detach() for text in ("aab", "cc")]
    for one in (model, db.load("model", "m"), db.live("model", "m")):
        found = [one.predict("aab"), *one.predict_batches(["aab", "cc"])]
        assert torch.allclose(torch.stack(found), torch.stack([expected[0], *expected]))


def test_predictions_of_documents_are_those_of_their_fields(db: Datalayer) -> None:
    texts(db)
    model = db.apply(served(model={"postprocess": lambda output: output.argmax().item()})).result()
    assert db.predict("model", "m", select=SELECT, into="guess").written == 40
    for document in db.execute(SELECT):
        assert document["guess"]["value"] == model.predict(document["text"])


def test_another_process_serves_it_too(server_uri: str) -> None:
    with Datalayer.connect(server_uri, progress=False, valid_fraction=0.2) as db:
        texts(db)
        offset = 1.5
        model = db.apply(served(valid_transform=lambda text, label: (numbers(text) + offset, label))).result()
        code = """
            from mongotorch import Datalayer
            with Datalayer.connect() as db:
                ANSWER = db.load("model", "m").predict("aab").tolist()
        """
        assert run_elsewhere(server_uri, code) == model.predict("aab").tolist()


def test_what_is_signed_is_verified_with_the_trainer(uri: str, tmp_path: Path) -> None:
    signed: dict[str, Any] = {"signing_key": "k" * 32, "trust": "signed", "progress": False, "valid_fraction": 0.2}
    with Datalayer.connect(uri, cache_dir=tmp_path, **signed) as db:
        texts(db)
        model = db.apply(served()).result()
        assert torch.equal(db.load("model", "m").predict("ab"), model.predict("ab"))
        records = db["mt.components"].raw
        (record,) = records.find({"type_id": "trainer", "job": {"$exists": True}})
        fields = {**record["fields"], "valid_transform": record["fields"]["transform"]}
        records.update_one({"_id": record["_id"]}, {"$set": {"fields": fields}})
        with pytest.raises(TrustError):
            db.load("model", "m")


class Tokens(nn.Module):
    """A model whose forward names its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
        output: Tensor = self.linear(ids * scale[:, None])
        return output


def tokens(text: str, label: Any) -> Any:
    return {"ids": numbers(text), "scale": torch.tensor(2.0), "target": label}


def two(text: str, size: int, label: Any) -> Any:
    return numbers(text), torch.tensor(float(size)), label


@pytest.mark.parametrize(
    ("given", "item", "expected"),
    [
        ({}, "ab", (numbers("ab"),)),
        ({"valid_transform": None, "transform": plain}, "ab", (numbers("ab"),)),
        ({"key": (["text"], {"label": "label"})}, "ab", (numbers("ab"),)),
        (
            {"key": ("text", "size", "label"), "valid_transform": two},
            ("ab", 2),
            (numbers("ab"), torch.tensor(2.0)),
        ),
        (
            {"signature": "**kwargs", "valid_transform": tokens},
            {"text": "ab"},
            {"ids": numbers("ab"), "scale": torch.tensor(2.0)},
        ),
        (
            {"key": {"text": "text", "label": "label"}, "signature": "*args,**kwargs", "valid_transform": tokens},
            {"text": "ab"},
            {"ids": numbers("ab"), "scale": torch.tensor(2.0)},
        ),
        (
            {"key": "text", "transform": lambda text: (numbers(text),) * 2, "valid_transform": None},
            "ab",
            (numbers("ab"),),
        ),
        (
            {"key": "text", "signature": "singleton", "valid_transform": numbers},
            "ab",
            (numbers("ab"),),
        ),
        (
            {"key": ("text", "size"), "signature": "singleton", "valid_transform": lambda part: numbers(part[0])},
            ("ab", 1),
            (numbers("ab"),),
        ),
        ({"transform": None, "valid_transform": None}, numbers("ab"), (numbers("ab"),)),
    ],
    ids=["pair", "transform", "both", "two", "named", "a dict", "itself", "single", "whole", "none"],
)
def test_items_have_the_form_of_the_key_without_the_target(
    given: dict[str, Any], item: Any, expected: Any
) -> None:
    module = Tokens() if isinstance(expected, Mapping) else net()
    of = served(**{"transform": None, **given, "model": TorchModel("m", object=module, preprocess="trainer")})
    found = of.served_input(of.model, item)
    assert type(found) is type(expected)
    parts, others = (list(one.values()) if isinstance(one, dict) else one for one in (found, expected))
    assert list(found) == list(expected) if isinstance(found, dict) else len(found) == len(expected)
    assert all(map(torch.equal, parts, others))


def failing(text: str, label: Any) -> Any:
    return numbers(text), torch.tensor(label)


def leaking(text: str, label: Any) -> Any:
    return (numbers(text), label, label)


@pytest.mark.parametrize(
    ("transform", "error", "match"),
    [
        (failing, TransformError, "gets None in place of a target"),
        (leaking, TransformError, "made of a target"),
        (lambda text, label: numbers(text) if label is None else (numbers(text), label), SignatureError, "1 part"),
    ],
    ids=["uses the target", "gives it to the model", "without a target"],
)
def test_what_cannot_do_without_the_target_is_refused_before_the_first_step(
    db: Datalayer, transform: Any, error: type[MongotorchError], match: str
) -> None:
    texts(db)
    job = db.apply(served(valid_transform=transform))
    with pytest.raises(error, match=match) as found:
        job.result()
    assert found.value.field == "preprocess"
    assert "a function of the inputs" in str(found.value)
    assert any("before the first step" in note for note in found.value.__notes__)
    assert not job.progress.get("step")


class Whole(nn.Linear):
    def training_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), y


@pytest.mark.parametrize(
    "given",
    [
        {"collate_fn": list},
        {"model": TorchModel("m", object=Whole(4, 3), train_forward_method="training_loss", preprocess="trainer")},
    ],
)
def test_what_makes_no_single_inputs_is_refused_at_once(given: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="a function of the inputs") as found:
        served(**given)
    assert found.value.field == "preprocess"


def test_a_version_without_a_trainer_cannot_serve(db: Datalayer) -> None:
    texts(db)
    with pytest.raises(ParameterError, match="function of the inputs"):
        db.apply(TorchModel("alone", object=net(), preprocess="trainer"))
    db.apply(served()).result()
    with pytest.raises(ParameterError, match="no trainer has published this version"):
        db.load("model", "m", 0).predict("ab")
    with pytest.raises(ParameterError, match='a function, "trainer" or None'):
        TorchModel("m", object=net(), preprocess="the trainer")  # type: ignore[arg-type]


@pytest.mark.parametrize("item", ["ab", {}, {"text": "ab", "colour": 1}])
def test_an_item_of_other_parts_is_refused(item: Any) -> None:
    model = TorchModel("m", object=Tokens(), preprocess="trainer")
    of = served(signature="**kwargs", transform=None, valid_transform=tokens, model=model)
    with pytest.raises(ParameterError, match="a dict of 'text', 'label', without the target") as found:
        of.served_input(model, item)
    assert found.value.field == "item"


@pytest.mark.parametrize("by", ["transform", "valid_transform", "collate_fn"])
def test_an_item_that_fits_no_module_is_told_what_training_made_of_it(db: Datalayer, by: str) -> None:
    def stacked(samples: list[Any]) -> tuple[Tensor, Tensor]:
        return torch.stack([numbers(text) for text, _ in samples]), torch.tensor([label for _, label in samples])

    changing: dict[str, dict[str, Any]] = {
        "transform": {"transform": plain, "valid_transform": None},
        "valid_transform": {"transform": plain, "valid_transform": plain},
        "collate_fn": {"transform": None, "valid_transform": None, "collate_fn": stacked},
    }
    texts(db)
    model = db.apply(served(model=TorchModel("m", object=net()), **changing[by])).result()
    with pytest.raises(ShapeError) as raised:
        model.predict("aab")
    (note,) = raised.value.__notes__
    assert f"{by} of its trainer" in note
    assert ('preprocess="trainer"' in note) is (by != "collate_fn")  # which makes no single inputs
    assert model.predict(numbers("aab")).shape == (3,)
