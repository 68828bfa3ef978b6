"""What is stored names public things: in records, in pickles, and whatever older releases called them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pickle
import pickletools
import pkgutil
import re
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from tests.fixtures import first_release as made

import mongotorch
from mongotorch import Cron, Datalayer, Every, Gate, Metric, Scores, TorchTrainer, Verdict, Worker
from mongotorch.codecs import FORMAT, Codecs, dumps, first_names, loads, name_of, resolve
from mongotorch.codecs.names import FIRST_NAMES, MARKER, PUBLIC_MODULES, stored_name
from mongotorch.component import ADDED, Component, Encoder, content_digest
from mongotorch.errors import UnsupportedError

PUBLIC = {"mongotorch", "mongotorch.errors", *PUBLIC_MODULES}
NAME = re.compile(r"^mongotorch(\.\w+)*(:\w+)?$")


class Local(Gate):
    """A gate of a module that mongotorch does not know."""

    def judge(self, champion: Scores | None, challenger: Scores | None) -> Verdict:
        return self.verdict(True, "always", champion, challenger)


def globals_of(data: bytes) -> set[str]:
    """The modules of mongotorch that a pickle names as texts."""
    texts = {argument for _, argument, _ in pickletools.genops(data) if isinstance(argument, str)}
    return {text for text in texts if text.split(".")[0] == "mongotorch"}


def texts(value: Any, key: str = "") -> Iterator[str]:
    """The texts in a record, but what an error says."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from texts(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from texts(part)
    elif isinstance(value, str) and key not in ("traceback", "message"):
        yield value


@pytest.mark.parametrize("first", FIRST_NAMES)
def test_every_name_that_the_first_release_stored_is_understood(first: str) -> None:
    found = resolve(first)
    public = FIRST_NAMES[first]
    assert resolve(public) is found
    assert name_of(found) == public
    with first_names():
        assert name_of(found) == first


def test_what_is_public_is_stored_by_its_public_name() -> None:
    for name in set(mongotorch.__all__) - {"__version__"}:
        assert name_of(getattr(mongotorch, name)) == f"mongotorch.{name}", name
    assert name_of(TorchTrainer.compute_objective) == "mongotorch.TorchTrainer.compute_objective"
    assert name_of(TorchTrainer.take_step) == "mongotorch.TrainingStep.take_step"  # which it inherits
    assert resolve("mongotorch.TrainingStep.take_step") is TorchTrainer.take_step
    assert resolve("mongotorch.train.trainer.TorchTrainer.take_step") is TorchTrainer.take_step


def test_every_component_and_value_of_the_package_has_a_public_name() -> None:
    found = []
    for module in pkgutil.walk_packages(mongotorch.__path__, "mongotorch."):
        if module.name.endswith("__main__"):
            continue
        try:
            names = vars(importlib.import_module(module.name))
        except UnsupportedError:  # a mirror whose package is not installed
            continue
        for value in names.values():
            if not isinstance(value, type) or value.__module__ != module.name or value.__name__.startswith("_"):
                continue
            abstract = bool(getattr(value, "__abstractmethods__", None)) and value is not Gate
            stored = issubclass(value, Component) or getattr(value, MARKER, False)
            if stored and not abstract:
                found.append(value)
                assert stored_name(value.__module__, value.__qualname__)[0] in PUBLIC, value
    assert len(found) > 15


def test_a_users_names_stay_as_they_are() -> None:
    assert name_of(made.accuracy) == "tests.fixtures.first_release.accuracy"
    assert stored_name("mongotorchlike.run.triggers.cron", "Cron") == ("mongotorchlike.run.triggers.cron", "Cron")
    assert name_of(Local) == f"{__name__}.Local"


def test_nothing_that_is_stored_names_a_private_module(server_uri: str) -> None:
    with Datalayer.connect(server_uri, progress=False, compute="queue") as db:
        db["rows"].insert_many(made.rows())
        held = Metric("held", object=lambda output, target: isinstance(Every(seconds=1), Metric) + 0.5)
        for component in (made.measured(), made.plain_trainer(), held):
            db.apply(component)
        for schedule in made.schedules({"lambda": lambda a, b: isinstance(b, Scores), "local": Local()}):
            db.apply(schedule)
        db.fire("always")
        db["mt.jobs"].raw.update_many({"status": "queued"}, {"$set": {"priority": 1}})
        Worker(db).run(until_idle=True)
        db.apply(made.long("long"))
        db.promote("model", "digits", 1)
        names: set[str] = set()
        formats: dict[str, set[Any]] = {}
        database = db["rows"].raw.database
        for collection in database.list_collection_names():
            for document in database[collection].find():
                if collection.startswith("mt.") and not collection.startswith("mt.artifacts"):
                    formats.setdefault(collection, set()).add(document.get("format"))
                names |= {text for text in texts(document) if NAME.match(text)}
        for name in db["mt.artifacts.files"].raw.distinct("filename"):
            data = b"".join(chunk["data"] for chunk in _chunks(db, name))
            names |= globals_of(data) if data[:2] == b"\x80\x04" else set()
    assert {"mongotorch:Cron", "mongotorch.TorchTrainer", "mongotorch"} <= names
    assert {name for name in names if (name.partition(":")[0] if ":" in name else name) not in PUBLIC} <= {
        f"mongotorch.{name}" for name in mongotorch.__all__
    }
    assert {collection: found for collection, found in formats.items() if found != {FORMAT}} == {}


def _chunks(db: Datalayer, name: str) -> Any:
    file = db["mt.artifacts.files"].raw.find_one({"filename": name})
    return db["mt.artifacts.chunks"].raw.find({"files_id": file["_id"]}).sort("n", 1)


def test_a_pickle_names_public_things_and_reads_old_names() -> None:
    value = functools.partial(isinstance, Cron("0 3 * * *"), Component)
    data = dumps(value, where="value").data
    assert globals_of(data) == {"mongotorch"}
    again = loads(data, python=None)
    assert (again.args, again.func) == (value.args, value.func)
    with first_names():
        first = dumps(value, where="value").data
    assert globals_of(first) == {"mongotorch.run.triggers.cron", "mongotorch.component"}
    assert loads(first, python=None).args == value.args


def test_a_value_reads_its_old_name() -> None:
    codecs = Codecs.default()
    record = codecs.encode(Cron("0 3 * * *"), lambda data: "")
    assert record["class"] == "mongotorch:Cron"
    first = {**record, "class": "mongotorch.run.triggers.cron:Cron"}
    assert codecs.decode(first, lambda name: b"") == Cron("0 3 * * *")


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Before(Component):
    type_id: ClassVar[str] = "grown"

    value: int = 1


def test_a_field_that_came_later_counts_only_where_it_says_something(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
    class After(Before):
        more: int | None = dataclasses.field(default=None, metadata={ADDED: "0.2"})

    After.__module__, After.__qualname__ = Before.__module__, Before.__qualname__
    codecs = Codecs.default()
    before = content_digest(Before("a"), Encoder(codecs))
    monkeypatch.setattr(sys.modules[__name__], "Before", After)  # the next release
    assert content_digest(After("a"), Encoder(codecs)) == before
    assert content_digest(After("a", more=None), Encoder(codecs)) == before
    assert content_digest(After("a", more=1), Encoder(codecs)) != before


def test_public_names_are_read_by_any_unpickler() -> None:
    data = dumps(functools.partial(isinstance, Every(seconds=1)), where="value").data
    assert pickle.loads(data).args == (Every(seconds=1),)
