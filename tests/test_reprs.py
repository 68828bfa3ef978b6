"""What values show of themselves, as text and in a notebook: short, escaped, and without a secret."""

from __future__ import annotations

import html.parser
import sys
import types
from typing import Any

import pytest

from mongotorch import ByHash, Datalayer, Query
from mongotorch.notebook import html_curves, html_table, is_notebook
from tests.helpers import COLLECTION, fill, trainer

SCRIPT = "<script>alert('&')</script>"


class WellFormed(html.parser.HTMLParser):
    """Fails where a tag is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.open.append(tag)
        self.seen.add(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def html_of(value: Any) -> str:
    """What a notebook shows, checked to be whole and free of scripts."""
    text: str = value._repr_html_()
    parser = WellFormed()
    parser.feed(text)
    assert parser.open == []
    assert "script" not in parser.seen
    assert len(text) < 20_000
    return text


def test_a_query_shows_what_it_asks() -> None:
    query = Query.find("points", {"labelled": True}, {"x": 1}).sort("n", -1).skip(2).limit(5).fold("train")
    found = "Query('points').find({'labelled': True}, projection={'x': 1})"
    assert repr(query) == found + ".sort([('n', -1)]).skip(2).limit(5).fold('train')"
    assert repr(Query.find("points")) == "Query('points').find()"
    assert (
        repr(Query.aggregate("points", [{"$match": {"y": 1}}]))
        == "Query('points').aggregate([{'$match': {'y': 1}}])"
    )
    assert "split=ByHash(" in repr(Query.find("points").fold("valid", split=ByHash(0.5)))
    assert "labelled" in html_of(query)


def test_a_long_filter_is_cut() -> None:
    query = Query.find("points", {"_id": {"$in": list(range(100_000))}})
    assert len(repr(query)) < 400
    assert repr(query).startswith("Query('points').find({'_id': {'$in': [0, 1, 2")


def test_values_of_documents_are_escaped() -> None:
    assert "<script" not in html_of(Query.find("points", {"name": SCRIPT}))


def test_inserted_ids_are_a_list_that_prints_short(db: Datalayer) -> None:
    inserted = db[COLLECTION].insert_many({"_id": n} for n in range(1000))
    assert inserted == list(range(1000))
    assert isinstance(inserted, list)
    assert repr(inserted) == "<1,000 inserted: 0, 1, 2, ...>"
    assert repr(db[COLLECTION].insert_many([{"_id": SCRIPT * 1000}])).endswith("…>")
    assert repr(db[COLLECTION].insert_many([])) == "<0 inserted: >"


def test_what_a_run_gives_is_shown(db: Datalayer) -> None:
    job = db.apply(trainer(fill(db), log_interval=2))
    shown = html_of(job)
    assert job.uuid in shown
    assert "succeeded" in shown
    assert "<polyline" in shown
    assert "train objective" in shown
    model = html_of(job.result())
    assert "TorchModel m" in model
    assert len(repr(job)) < 200


def test_a_failed_run_shows_its_error(db: Datalayer) -> None:
    job = db.apply(trainer(fill(db), objective=fail))
    shown = html_of(job)
    assert "failed" in shown
    assert "&lt;script&gt;" in shown


def fail(*_: Any) -> Any:
    raise ValueError(SCRIPT)


def test_checks_and_explanations_are_tables(db: Datalayer) -> None:
    select = fill(db)
    db[COLLECTION].insert_one({"_id": "odd", SCRIPT.replace(".", ""): 1})
    assert "<table>" in html_of(db.check(select))
    assert "bottleneck" in html_of(db.explain(trainer(db[COLLECTION].find({"y": {"$exists": True}}))))


def test_a_job_plots_its_curves(db: Datalayer) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    axes = db.apply(trainer(fill(db), log_interval=2)).plot()
    assert len(axes.lines) == 2
    pyplot.close("all")


def test_a_datalayer_hides_its_password() -> None:
    with Datalayer.connect("mongomock://hidden") as db:
        assert repr(db) == "Datalayer(Connection('mongomock://hidden'))"


def test_long_tables_and_odd_curves_stay_small() -> None:
    table = html_table("t", ("a",), [[n] for n in range(1000)])
    assert table.count("<tr>") == 51
    assert "950 more" in table
    assert (
        html_curves({})
        == html_curves({"a": ([1], [1.0])})
        == html_curves({"a": ([1, 2], [float("nan")] * 2)})
        == ""
    )
    drawn = html_curves({SCRIPT: (list(range(100_000)), [1.0] * 100_000)})
    assert "<script" not in drawn
    assert len(drawn) < 10_000


def test_a_notebook_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", None)
    assert not is_notebook()
    for name, found in (("IPKernelApp", True), ("TerminalIPythonApp", False)):
        shell = types.SimpleNamespace(config={name: {}})
        monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda shell=shell: shell))
        assert is_notebook() is found
